"""Finds and loads the shared library of this folder. Knows no tensors.

The library has a plain C interface, so one build serves every Python and every torch. Where it is
missing everything still runs on the reference; `missing_reason` says what to do about it.
"""

from __future__ import annotations


def set_num_threads(num_threads: int) -> None:
    """Let the native code use `num_threads` threads, this one included."""
