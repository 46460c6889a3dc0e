"""Measurements; every one ends with one JSON line."""
