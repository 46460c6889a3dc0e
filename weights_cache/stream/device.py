"""The tensors of an artefact in a device's memory: chunks pass through a ring into one allocation.

    reader -> slot of the ring -> hash -> asynchronous copy -> the slot is free again

A chunk is hashed before it is copied, so what is in the arena is good. A slot is written again only
when the device has read it. Host memory is the ring's, whatever the model's size. Knows tensors,
readers and a device's copies; knows no model.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

import torch

from ..arena import Arena
from ..reader.readers import Filled, Reader
from ..reader.ring import Ring
from .mapped import TORCH_DTYPES

NUM_WORKERS = 4
"""Hashing runs at memory speed on each; the copies are one after the other."""


class Fence(Protocol):
    """A point in the device's work."""

    def wait(self) -> None:
        """Returns when everything before it is done."""


class Copier(Protocol):
    """A device's way of taking bytes. Copies are in order; one thread at a time begins one."""

    def open(self, ring: Ring, num_bytes: int) -> torch.Tensor:
        """Prepares the ring, and the memory that is copied to: uint8, on the device."""

    def copy(self, start: int, num_bytes: int, offset: int) -> Fence:
        """Begins to copy from the ring's `start` to `offset`; done when the fence says so."""

    def close(self) -> None:
        """Everything copied is there for all; the ring is as it was."""


class DeviceArena:
    """Immovable from the start, filled once: `tensor` gives views, good when `finish` returns."""

    def __init__(
        self,
        arena: Arena,
        reader: Reader,
        copier: Copier,
        verifies: bool = True,
    ) -> None:
        """Begins to fill it, on threads of its own: the addresses are there, the bytes will be."""
        self._arena = arena
        self._began_s = time.monotonic()
        self._filling = _Filling(arena, reader, copier, verifies)
        self._memory = self._filling.start()
        self.copied_s = 0.0

    def finish(self, on_bytes: Callable[[int], None] = lambda _num_done: None) -> None:
        """Returns when every byte is there. Raises BadArtefact: then what is there is not good.

        `on_bytes` is told how many are, again and again.
        """
        self._filling.finish(on_bytes)
        self.copied_s = self._filling.ended_s - self._began_s

    def abandon(self) -> None:
        """Nothing is written any more."""
        self._filling.abandon()

    def tensor(self, name: str) -> torch.Tensor:
        stored = self._arena.tensors[name]
        data = self._memory[stored.offset : stored.end]
        return data.view(TORCH_DTYPES[stored.dtype]).view(stored.shape)


class _Filling:
    """The work between the reader and the device: workers hash and copy, one thread frees slots."""

    def __init__(
        self,
        arena: Arena,
        reader: Reader,
        copier: Copier,
        verifies: bool,
    ) -> None:
        self._arena = arena
        self._reader = reader
        self._copier = copier
        self._verifies = verifies
        self._lock = threading.Lock()
        self._num_bytes = 0
        self._on_bytes: Callable[[int], None] = lambda _num_done: None
        self.ended_s = 0.0
        self._is_over = False
        self._error: BaseException | None = None
        self._copying: queue.SimpleQueue[tuple[Fence, Filled] | None] = queue.SimpleQueue()

    def start(self) -> torch.Tensor:
        with torch.inference_mode(False):  # other threads write to it
            memory = self._copier.open(self._reader.ring, self._arena.num_bytes)
        self._freeing = threading.Thread(target=self._free_slots, name="free-slots", daemon=True)
        self._workers = [
            threading.Thread(target=self._work, name=f"copy-{i}", daemon=True)
            for i in range(NUM_WORKERS)
        ]
        for thread in (self._freeing, *self._workers):
            thread.start()
        return memory

    def finish(self, on_bytes: Callable[[int], None]) -> None:
        self._on_bytes = on_bytes
        self._join()
        on_bytes(self._num_bytes)
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        self._reader.close()
        self._join()

    def _join(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        for worker in self._workers:
            worker.join()
        self._copying.put(None)
        self._freeing.join()
        self._copier.close()
        self._reader.close()

    def _work(self) -> None:
        try:
            while (filled := self._reader.take()) is not None:
                if self._verifies:
                    self._check(filled)
                self._copy(filled)
        except BaseException as error:
            self._fail(error)

    def _check(self, filled: Filled) -> None:
        with self._reader.ring.view(filled.slot, filled.num_bytes) as view:
            self._arena.check_chunk(filled.index, view)

    def _copy(self, filled: Filled) -> None:
        offset, _ = self._arena.chunk(filled.index)
        with self._lock:
            start = self._reader.ring.start(filled.slot)
            fence = self._copier.copy(start, filled.num_bytes, offset)
            self._copying.put((fence, filled))

    def _free_slots(self) -> None:
        """In the order of the copies: the oldest is done first."""
        try:
            while (copying := self._copying.get()) is not None:
                fence, filled = copying
                fence.wait()
                self._reader.release(filled.slot)
                self._num_bytes += filled.num_bytes
                self._on_bytes(self._num_bytes)
            self.ended_s = time.monotonic()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """The first error is the cause; closing the reader ends all the others."""
        with self._lock:
            self._error = self._error or error
        self._reader.close()
