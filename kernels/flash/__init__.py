"""Attention of the flash-attn package, where it is installed beside torch."""
