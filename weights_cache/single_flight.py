"""Claims: of all who want to do the same work, one does it, the others wait for it.

A claim is the folder `claims/<name>/` with its owner's file in it. It is made aside and renamed
into place: a rename onto a folder that is not empty fails, whoever tries and on any file system.
A claim whose owner is gone is emptied by removing *that owner's* file, which cannot hit the next
one. Should a file system lie even so, two do the same work: the store's other parts bear that.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .leases import OwnedFiles
from .liveness import Owner

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.005
LONGEST_PAUSE_S = 0.25
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
"""Another one was faster; ENOENT when its sweep took the folder that we were making."""


class Claim:
    """Held by `owner` until `close`."""

    def __init__(self, owned: OwnedFiles, path: Path, owner: Owner) -> None:
        self._owned = owned
        self._path = path
        self.owner = owner
        owned.heartbeat.add(path)

    def close(self) -> None:
        self._owned.give_up(self._path, self.owner)
        with suppress(OSError):
            self._owned.files.rmdir(self._path.parent)


class Claims:
    """All claims of a store."""

    def __init__(self, owned: OwnedFiles, folder: Path, pause: Callable[[float], None]) -> None:
        self._owned = owned
        self._files = owned.files
        self._folder = folder
        self._pause = pause

    @contextmanager
    def claim(
        self, name: str, is_done: Callable[[], bool] = lambda: False
    ) -> Iterator[Claim | None]:
        """Waits for the claim; None as soon as `is_done`. Raises OSError."""
        claim = self._wait(name, is_done)
        try:
            yield claim
        finally:
            if claim is not None:
                claim.close()

    def _wait(self, name: str, is_done: Callable[[], bool]) -> Claim | None:
        pause_s = FIRST_PAUSE_S
        while not is_done():
            claim = self.try_claim(name)
            if claim is not None:
                return claim
            self._pause(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return None

    def try_claim(self, name: str) -> Claim | None:
        """None: somebody has it. Raises OSError."""
        if self.is_claimed(name):
            return None
        self._sweep(name)
        owner = self._owned.processes.new_owner()
        aside, place = self._folder / f"{name}~{owner}", self._folder / name
        try:
            self._files.mkdir(aside)
            self._owned.create(aside / str(owner))
            self._files.rename(aside, place)
        except BaseException as error:
            for folder in (aside, place):  # an error does not say that nothing happened
                self._owned.give_up(folder / str(owner), owner)
            with suppress(OSError):
                self._files.rmdir(aside)
            if isinstance(error, OSError) and error.errno in TAKEN:
                return None
            raise
        return Claim(self._owned, place / str(owner), owner)

    def is_claimed(self, name: str) -> bool:
        folder = self._folder / name
        try:
            names = self._files.list(folder)
        except FileNotFoundError:
            return False
        return any(self._owned.is_live(folder / name) for name in names)

    def any_claimed(self, prefix: str) -> bool:
        """Whether anybody works on anything whose name starts so."""
        names = self._files.list(self._folder)
        return any(
            self.is_claimed(name) for name in names if name.startswith(prefix) and "~" not in name
        )

    def sweep(self) -> None:
        for name in self._files.list(self._folder):
            with suppress(OSError):  # the others all the same
                self._sweep(name)

    def _sweep(self, name: str) -> None:
        """Of those who are gone, and of nothing at all."""
        with suppress(FileNotFoundError):
            self._owned.sweep(self._folder / name)
        with suppress(OSError):
            self._files.rmdir(self._folder / name)
