"""The memory that chunks pass through on their way to a device, and how much of it there is.

Knows sizes; nothing of files, threads or devices.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

MAX_RING_BYTES = 256 << 20
"""Enough to keep disks and copy engine busy; more is only more to fault in and to page-lock."""
SHARE_OF_FREE = 4
"""At most a quarter of what the machine, or the cgroup, has left."""
MIN_SLOTS = 2


def num_slots(num_bytes: int, chunk_bytes: int, free_bytes: int) -> int:
    """How many chunks are in memory at once, for `num_bytes` of data: two at least."""
    budget = min(MAX_RING_BYTES, free_bytes // SHARE_OF_FREE)
    num_chunks = -(-num_bytes // chunk_bytes)
    return max(MIN_SLOTS, min(budget // chunk_bytes, num_chunks))


class Ring:
    """Slots of equal size, one after the other, at an address that any O_DIRECT accepts."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.num_slots = slots
        self.slot_bytes = slot_bytes
        self.memory = mmap.mmap(-1, slots * slot_bytes)
        with suppress(OSError):  # a system without large pages
            self.memory.madvise(mmap.MADV_HUGEPAGE)

    def start(self, slot: int) -> int:
        """Of a slot, in bytes from the ring's own start."""
        return slot * self.slot_bytes

    def view(self, slot: int, num_bytes: int) -> memoryview:
        start = self.start(slot)
        return memoryview(self.memory)[start : start + num_bytes]
