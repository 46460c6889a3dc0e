"""The pages of a mapping: brought in with an error where a touch would be a SIGBUS.

The one place that calls the C library. Knows mappings; nothing of what lies in them.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

MADV_POPULATE_READ = 22
"""Linux 5.14."""
_LIBC = ctypes.CDLL(None, use_errno=True)
_LOWEST_BIT = bytes(value & 1 for value in range(256))


class _BufferHead(ctypes.Structure):
    """The start of CPython's Py_buffer, and room for its rest."""

    _fields_ = (("address", ctypes.c_void_p), ("rest", ctypes.c_byte * 128))


def address_of(mapping: mmap.mmap) -> int:
    """Where it lies, read-only mappings too; valid until the mapping is closed."""
    head = _BufferHead()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapping), ctypes.byref(head), 0)
    address = int(head.address or 0)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(head))
    return address


def resident_fraction(mapping: mmap.mmap) -> float:
    """The share of the mapping's pages that are in memory now, 0 to 1. Raises OSError."""
    num_pages = -(-len(mapping) // mmap.PAGESIZE)
    return num_resident(mapping) / num_pages if num_pages else 1.0


def num_resident(mapping: mmap.mmap) -> int:
    """Pages of the mapping that are in memory, by mincore(2); of the file, whoever brought them."""
    num_pages = -(-len(mapping) // mmap.PAGESIZE)
    marks = (ctypes.c_ubyte * num_pages)()
    start = ctypes.c_void_p(address_of(mapping))
    if _LIBC.mincore(start, ctypes.c_size_t(len(mapping)), marks) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    # The lowest bit says it; the others are reserved.
    return bytes(marks).translate(_LOWEST_BIT).count(1)


def populate(mapping: mmap.mmap, offset: int, num_bytes: int) -> bool:
    """Reads and maps the pages while other threads run. False: this system has no such call.

    Raises OSError for pages that cannot be read: a bad disk, a file that became shorter.
    """
    start = ctypes.c_void_p(address_of(mapping) + offset)
    if _LIBC.madvise(start, ctypes.c_size_t(num_bytes), MADV_POPULATE_READ) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code))
