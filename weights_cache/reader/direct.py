"""Whether a file is read faster past the page cache: asked of the page cache, then of the clock.

What is in memory is copied from there. Else both ways read a little of the file: file systems and
disks differ too much for a rule. Knows one file at a time.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from contextlib import suppress

from ..arena import Arena
from ..pages import resident_fraction
from .readers import open_direct

RESIDENT_ENOUGH = 0.5
PROBE_BYTES = 8 << 20
PROBE_S = 0.04
"""For each way: less than a tenth of a second in all."""


def reads_direct(arena: Arena, clock: Callable[[], float] = time.monotonic) -> bool:
    with suppress(OSError):
        if resident_fraction(arena.map()) >= RESIDENT_ENOUGH:
            return False
    descriptor = open_direct(arena)
    if descriptor < 0:
        return False
    try:
        # Each its own half, and forwards: what one reads ahead is no help to the other.
        middle = arena.header.num_chunks // 2
        direct = _rate(arena, descriptor, 0, middle, clock)
        return direct > _rate(arena, arena.descriptor, middle, arena.header.num_chunks, clock)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _rate(
    arena: Arena, descriptor: int, first_chunk: int, end: int, clock: Callable[[], float]
) -> float:
    """Bytes per second, chunk by chunk until the time is over."""
    num_bytes, began_s, index = 0, clock(), first_chunk
    with mmap.mmap(-1, max(PROBE_BYTES, arena.header.chunk_bytes)) as memory:
        while index < end and clock() - began_s < PROBE_S:
            start, wanted = arena.chunk(index)
            with memoryview(memory)[:wanted] as view:
                num_bytes += os.preadv(descriptor, [view], arena.header.data_offset + start)
            index += 1
    return num_bytes / max(clock() - began_s, 1e-9)
