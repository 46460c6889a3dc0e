"""Tensors out of files: the only part of the cache that knows torch."""
