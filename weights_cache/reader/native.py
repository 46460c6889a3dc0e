"""Finds and loads the reader's library. Without it the reader's threads are Python's.

Knows the C interface of reader.cpp.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

LIBRARY_PATH = Path(__file__).with_name("libpilotlight_reader.so")
ABI_VERSION = 1


class Chunk(ctypes.Structure):
    """Chunk in reader.cpp."""

    _fields_ = (
        ("index", ctypes.c_int64),
        ("slot", ctypes.c_int),
        ("num_bytes", ctypes.c_int64),
        ("error", ctypes.c_int),
    )


@cache
def library() -> ctypes.CDLL | None:
    """None where it was not built, or was built for another version."""
    try:
        found = ctypes.CDLL(str(LIBRARY_PATH))
        if found.pilotlight_reader_abi_version() != ABI_VERSION:
            return None
    except (OSError, AttributeError):
        return None
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    found.pilotlight_reader_start.restype = pointer
    found.pilotlight_reader_start.argtypes = [
        ctypes.c_int, ctypes.c_int, size, size, size, pointer, ctypes.c_int, ctypes.c_int,
    ]  # fmt: skip
    found.pilotlight_reader_take.argtypes = [pointer, pointer]
    found.pilotlight_reader_release.argtypes = [pointer, ctypes.c_int]
    found.pilotlight_reader_release.restype = None
    for name in ("stop", "free"):
        function = getattr(found, f"pilotlight_reader_{name}")
        function.argtypes, function.restype = [pointer], None
    return found
