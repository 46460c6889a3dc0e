"""Checkpoints as files and bytes; a tensor is made only in stream.py."""
