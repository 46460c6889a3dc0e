"""Zeroed memory in large pages, for what is read here and there. Knows no operation."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch

LARGE_PAGE_BYTES = 2 << 20


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the processor that the system zeroes at its first use: torch would write it all.

    In large pages but for the first two MiB: of every layer's cache the first token touches one
    page, which must not cost the zeroing of a large one.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if num_bytes > LARGE_PAGE_BYTES:
        with suppress(OSError):  # a system without large pages
            memory.madvise(mmap.MADV_HUGEPAGE, LARGE_PAGE_BYTES)
    return torch.frombuffer(memory, dtype=torch.uint8)[:num_bytes].view(dtype).view(shape)
