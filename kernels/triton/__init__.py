"""Implementations in Triton, for CUDA devices; its interpreter runs them anywhere, slowly."""
