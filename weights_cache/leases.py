"""Leases: files that say "in use", and outlive nobody: `leases/<object>~<owner>`.

A reader takes its lease before it opens the object; who deletes looks for leases after it moved
the object away. So an object that was opened under a lease is never deleted. All leases lie in one
folder that is always there: "not found", which a network file system may remember wrongly, never
means "not in use". No locks, no wall clock (see liveness.py). Knows objects by name.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from .files import FileSystem
from .liveness import Heartbeat, Life, Owner, Surroundings, Watch

logger = logging.getLogger(__name__)


class OwnedFiles:
    """Files whose names end in their owner, as leases and claims do: written, judged, removed."""

    def __init__(self, files: FileSystem, surroundings: Surroundings) -> None:
        self.files = files
        self.processes = surroundings.processes
        self.heartbeat = Heartbeat(files, surroundings.beat_s)
        self.watch = Watch(surroundings.clock)

    def create(self, path: Path) -> None:
        with self.files.opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
            self.files.write_all(descriptor, b"%020d" % 0, 0)

    def is_live(self, path: Path) -> bool:
        """Whoever cannot be seen to be gone is taken to be there."""
        owner = Owner.parse(path.name.rpartition("~")[2])
        life = Life.UNKNOWN if owner is None else self.processes.life(owner)
        if life is not Life.UNKNOWN:
            return life is Life.ALIVE
        try:
            content = self.files.read(path)
        except OSError as error:
            return not isinstance(error, FileNotFoundError)
        return not self.watch.is_still(str(path), content)

    def sweep(self, folder: Path) -> None:
        """Removes the files of those who are gone."""
        for name in self.files.list(folder):
            if not self.is_live(folder / name):
                self.files.unlink(folder / name, missing_ok=True)
                self.watch.forget(str(folder / name))

    def give_up(self, path: Path, owner: Owner) -> None:
        """However little the file system does now: the owner is over, and others come to see it."""
        self.heartbeat.remove(path)
        if not self.processes.is_mine(owner):
            return  # a forked child closes what its parent still holds
        self.processes.end(owner)
        try:
            self.files.unlink(path, missing_ok=True)
        except OSError as error:
            logger.warning("%s cannot be removed (%s); the next try is soon", path, error)
            self.heartbeat.unlink_soon(path)


class Lease:
    """Held until `close`, or until the process ends in any way."""

    def __init__(self, owned: OwnedFiles, folder: Path, name: str) -> None:
        self._owned = owned
        self._owner = owned.processes.new_owner()
        self.path = folder / f"{name}~{self._owner}"

    def take(self) -> None:
        try:
            self._owned.create(self.path)
        except BaseException:
            self.close()
            raise
        self._owned.heartbeat.add(self.path, self._create_again)

    def close(self) -> None:
        self._owned.give_up(self.path, self._owner)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _create_again(self) -> None:
        """An observer elsewhere took us for gone: this process must have been suspended."""
        logger.warning("the lease %s was removed by others while it was held", self.path)
        with suppress(OSError):
            self._owned.create(self.path)
        if self._owned.processes.life(self._owner) is not Life.ALIVE:
            self.close()  # it was closed meanwhile


class Leases:
    """All leases of a store. Methods raise OSError."""

    def __init__(self, owned: OwnedFiles, folder: Path) -> None:
        self._owned = owned
        self._folder = folder

    def take(self, name: str) -> Lease:
        lease = Lease(self._owned, self._folder, name)
        lease.take()
        return lease

    def num_live(self, name: str) -> int:
        names = self._owned.files.list(self._folder)
        mine = (entry for entry in names if entry.startswith(f"{name}~"))
        return sum(self._owned.is_live(self._folder / entry) for entry in mine)

    def sweep(self) -> None:
        self._owned.sweep(self._folder)
