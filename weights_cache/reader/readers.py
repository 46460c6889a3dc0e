"""Chunks of an artefact, whole and in any order, in the slots of a ring: by C++ or Python threads.

    reader = start_reader(arena, ring)
    while (filled := reader.take()) is not None: … reader.release(filled.slot)

Knows files and slots; what the bytes mean, and where they go, others know.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from ...engine.errors import BadArtefact
from ..arena import Arena
from ..pages import address_of
from . import native
from .ring import Ring

NUM_THREADS = 8


@dataclass(frozen=True, slots=True)
class Filled:
    """A chunk that is there: its bytes are the first `num_bytes` of the slot."""

    index: int
    slot: int
    num_bytes: int


class Reader(Protocol):
    """Any thread may take; each chunk is taken once."""

    ring: Ring

    def take(self) -> Filled | None:
        """The next chunk; None when all were taken, or after `close`. Raises BadArtefact."""

    def release(self, slot: int) -> None:
        """What is in the slot is no longer needed."""

    def close(self) -> None:
        """Ends the reading; who waits in `take` gets None. Again: nothing."""


def start_reader(
    arena: Arena, ring: Ring, is_direct: bool = False, num_threads: int = NUM_THREADS
) -> Reader:
    """Begins to fill the ring at once. `is_direct`: past the page cache, where that is allowed."""
    library = native.library()
    if library is None:
        return ThreadReader(arena, ring, num_threads)
    return NativeReader(library, arena, ring, is_direct, num_threads)


class NativeReader:
    """Its threads read while Python does something else, or nothing but imports."""

    def __init__(
        self, library: ctypes.CDLL, arena: Arena, ring: Ring, is_direct: bool, num_threads: int
    ) -> None:
        self.ring = ring
        self._arena = arena
        self._library = library
        self._direct = open_direct(arena) if is_direct else -1
        header = arena.header
        self._reader: Any = library.pilotlight_reader_start(
            arena.descriptor, self._direct, header.data_offset, header.data_bytes,
            header.chunk_bytes, address_of(ring.memory), ring.num_slots, num_threads,
        )  # fmt: skip
        if not self._reader:
            raise MemoryError("no threads could be started to read the artefact")
        self._users = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def take(self) -> Filled | None:
        if not self._enter():
            return None
        chunk = native.Chunk()
        try:
            found = self._library.pilotlight_reader_take(self._reader, ctypes.byref(chunk))
        finally:
            self._leave()
        if found <= 0:
            return None
        return checked(self._arena, chunk.index, chunk.slot, chunk.num_bytes, chunk.error)

    def release(self, slot: int) -> None:
        if self._enter():
            self._library.pilotlight_reader_release(self._reader, slot)
            self._leave()

    def close(self) -> None:
        with self._changed:
            was_closed, self._is_closed = self._is_closed, True
        if was_closed:
            return
        self._library.pilotlight_reader_stop(self._reader)
        with self._changed:
            self._changed.wait_for(lambda: self._users == 0)
        self._library.pilotlight_reader_free(self._reader)
        if self._direct >= 0:
            os.close(self._direct)

    def _enter(self) -> bool:
        """Nobody is in the library when its memory goes."""
        with self._changed:
            self._users += not self._is_closed
            return not self._is_closed

    def _leave(self) -> None:
        with self._changed:
            self._users -= 1
            self._changed.notify_all()


class ThreadReader:
    """The same by Python threads, through the cache's own file calls."""

    def __init__(self, arena: Arena, ring: Ring, num_threads: int) -> None:
        self.ring = ring
        self._arena = arena
        self._changed = threading.Condition()
        self._free = deque(range(ring.num_slots))
        self._done: deque[tuple[int, int, int, int]] = deque()
        self._next = self._num_taken = 0
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"read-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def _num_chunks(self) -> int:
        return self._arena.header.num_chunks

    def take(self) -> Filled | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or self._done or self._num_taken == self._num_chunks
            )
            if self._is_closed or not self._done:
                return None
            found = self._done.popleft()
            self._num_taken += 1
            self._changed.notify_all()
        return checked(self._arena, *found)

    def release(self, slot: int) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (work := self._next_work()) is not None:
            index, slot = work
            num_bytes, error = self._read(index, slot)
            with self._changed:
                self._done.append((index, slot, num_bytes, error))
                self._changed.notify_all()

    def _next_work(self) -> tuple[int, int] | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or self._free or self._next == self._num_chunks
            )
            if self._is_closed or self._next == self._num_chunks:
                return None
            self._next += 1
            return self._next - 1, self._free.popleft()

    def _read(self, index: int, slot: int) -> tuple[int, int]:
        """How many bytes are there, and errno if not all."""
        start, num_bytes = self._arena.chunk(index)
        view, done = self.ring.view(slot, num_bytes), 0
        offset = self._arena.header.data_offset + start
        try:
            while done < num_bytes:
                got = self._arena.files.pread_into(
                    self._arena.descriptor, view[done:], offset + done
                )
                if got == 0:
                    break
                done += got
        except OSError as error:
            return done, error.errno or 0
        return done, 0


def checked(arena: Arena, index: int, slot: int, num_bytes: int, error: int) -> Filled:
    """Raises BadArtefact for a chunk that is not all there."""
    start, wanted = arena.chunk(index)
    if num_bytes == wanted:
        return Filled(index, slot, num_bytes)
    at = f"chunk {index}, byte {arena.header.data_offset + start + num_bytes}"
    reason = os.strerror(error) if error else f"the file ends {wanted - num_bytes} bytes too early"
    raise BadArtefact(f"{arena.path} cannot be read at {at}: {reason}")


def open_direct(arena: Arena) -> int:
    """A descriptor that reads past the page cache; -1 where the file system has no such thing."""
    try:
        return os.open(arena.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return -1
