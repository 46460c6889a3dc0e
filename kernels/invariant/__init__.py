"""Triton operations whose result for a row depends on nothing but that row: for --deterministic."""
