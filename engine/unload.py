"""Gives back to the system what an unloaded model leaves in this process.

Knows Python's collector and the C library's heap; torch only where it was imported already. Whoever
held the model has let go of it before.
"""

from __future__ import annotations

import ctypes
import gc
import sys


def give_memory_back() -> None:
    """Collects what was frozen at the load, empties torch's caches, trims the heap."""
    gc.unfreeze()
    gc.collect()
    if "torch" in sys.modules:
        from .worker.release import empty_caches

        empty_caches()
    _trim_heap()


def _trim_heap() -> None:
    """glibc keeps freed pages for its next allocation: the next model may be another process's."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
