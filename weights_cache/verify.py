"""Every chunk of an artefact hashed and compared, while the process does something else.

Hashing the mapping also brings its pages in, so whoever waits for the verdict finds the bytes in
memory. Knows arenas; nothing of who waits, or of what is done with a bad one.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from ..engine.errors import BadArtefact
from .arena import Arena
from .pages import resident_fraction

OnBytes = Callable[[int], None]
"""Called with the bytes found good so far; from any thread, one at a time."""

MAX_THREADS = 8


def verify_chunks(
    arena: Arena,
    on_bytes: OnBytes = lambda _num_done: None,
    stop: threading.Event | None = None,
    num_threads: int = 1,
) -> bool:
    """True: all are good. False: stopped before. Raises BadArtefact, which names the chunk."""
    return _Pass(arena, on_bytes, stop or threading.Event(), num_threads).run()


def default_threads() -> int:
    """Half of the processor: the other half imports torch meanwhile."""
    return max(1, min(MAX_THREADS, len(os.sched_getaffinity(0)) // 2))


class Verification:
    """A thread that verifies. `wait` for it before READY, or let `on_failure` hear of it later."""

    def __init__(
        self,
        arena: Arena,
        on_bytes: OnBytes = lambda _num_done: None,
        on_failure: Callable[[BadArtefact], None] = lambda _error: None,
        num_threads: int | None = None,
    ) -> None:
        self._arena = arena
        self._on_bytes = on_bytes
        self._on_failure = on_failure
        self._num_threads = num_threads or default_threads()
        self._stop = threading.Event()
        self._is_good = False
        self.began_s = self.ended_s = 0.0
        """time.monotonic() of the pass."""
        self.page_cache_fraction = -1.0
        """Of the artefact's pages, in memory when the pass began; -1: not known."""
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="verify", daemon=True)

    def start(self) -> Verification:
        self._thread.start()
        return self

    @property
    def is_done(self) -> bool:
        return self._thread.ident is not None and not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> bool:
        """True: every byte is good. False: stopped, or not done in time. Raises BadArtefact."""
        self._thread.join(timeout_s)
        if self._error is not None:
            raise self._error
        return self._is_good

    def stop(self) -> None:
        """Ends it early and waits for that; a verdict that was not reached is none."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._verify()
        except BaseException as error:
            self._error = error

    def _verify(self) -> None:
        self.began_s = time.monotonic()
        with suppress(OSError):
            self.page_cache_fraction = resident_fraction(self._arena.map())
        try:
            self._is_good = verify_chunks(
                self._arena, self._on_bytes, self._stop, self._num_threads
            )
        except BadArtefact as error:
            self._on_failure(error)
            raise
        finally:
            self.ended_s = time.monotonic()


class _Pass:
    """One walk over all chunks, by several threads that take the next one in turn."""

    def __init__(
        self, arena: Arena, on_bytes: OnBytes, stop: threading.Event, num_threads: int
    ) -> None:
        self._arena = arena
        self._on_bytes = on_bytes
        self._stop = stop
        self._num_threads = min(num_threads, arena.header.num_chunks)
        self._indices = itertools.count()
        self._lock = threading.Lock()
        self._num_good_bytes = 0
        self._error: BaseException | None = None

    def run(self) -> bool:
        helpers = [
            threading.Thread(target=self._work, name=f"verify-{index}", daemon=True)
            for index in range(1, self._num_threads)
        ]
        for helper in helpers:
            helper.start()
        self._work()
        for helper in helpers:
            helper.join()
        if self._error is not None:
            raise self._error
        return self._num_good_bytes == self._arena.num_bytes

    def _work(self) -> None:
        try:
            while not self._stop.is_set() and self._error is None:
                index = next(self._indices)
                if index >= self._arena.header.num_chunks:
                    return
                self._check(index)
        except BaseException as error:
            self._error = error

    def _check(self, index: int) -> None:
        start, num_bytes = self._arena.chunk(index)
        try:
            self._arena.check_chunk(index, self._arena.resident(start, num_bytes))
        except OSError as error:
            raise BadArtefact(
                f"{self._arena.path} cannot be read at chunk {index}: {error.strerror}"
            ) from error
        with self._lock:
            self._num_good_bytes += num_bytes
            self._on_bytes(self._num_good_bytes)
