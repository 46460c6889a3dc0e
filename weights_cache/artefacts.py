"""Artefacts in the store: found under a lease, built once, published whole, condemned when bad.

`arenas/<key>/` is the folder in which its builder worked, renamed: a rename onto a folder that is
not empty fails, so a published artefact is never written over. Knows the arena's format only as
open or bad.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from ..engine.errors import BadArtefact
from .arena import CHUNK_BYTES, Arena, TensorSpec, open_arena
from .arena_writer import ArenaWriter
from .disk_errors import disk_errors
from .files import FileSystem
from .leases import Lease, Leases
from .single_flight import TAKEN, Claims
from .trash import Trash
from .verify import OnBytes, Verification
from .workplaces import Workplaces

logger = logging.getLogger(__name__)

ARENA_NAME, USED_NAME = "arena.bin", "used"
PREFIX = "arena-"
"""Before a key, in the names of leases and claims."""
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NUM_TRIES = 4

Build = Callable[[ArenaWriter], None]


class LeasedArena:
    """An open artefact that is not evicted until `close`, or until the process ends."""

    def __init__(self, arena: Arena, lease: Lease | None, condemn: Callable[[], None]) -> None:
        self.arena = arena
        self.path = arena.path
        self._lease = lease
        self._condemn = condemn

    @property
    def is_leased(self) -> bool:
        """False where the store cannot be written: whoever can, may evict it meanwhile."""
        return self._lease is not None

    def verification(
        self,
        on_bytes: OnBytes = lambda _num_done: None,
        on_failure: Callable[[BadArtefact], None] = lambda _error: None,
        num_threads: int | None = None,
    ) -> Verification:
        """Not started. If it fails, the artefact is condemned: the next look for it is a miss."""

        def failed(error: BadArtefact) -> None:
            self.condemn()
            on_failure(error)

        return Verification(self.arena, on_bytes, failed, num_threads)

    def condemn(self) -> None:
        """Its bytes are bad: nobody finds it any more, and the next builder builds it anew."""
        self._condemn()

    def close(self) -> None:
        self.arena.close()
        if self._lease is not None:
            self._lease.close()

    def __enter__(self) -> LeasedArena:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class ArenaRecord:
    """One artefact, for lists: times are the file system's, in seconds since 1970."""

    key: str
    num_bytes: int
    used_at: float
    num_leases: int
    about: Mapping[str, str] = field(default_factory=dict)


class Artefacts:
    """All of a store. Methods raise OSError, except where they say otherwise."""

    def __init__(
        self,
        files: FileSystem,
        root: Path,
        trash: Trash,
        leases: Leases,
        claims: Claims,
        workplaces: Workplaces,
    ) -> None:
        self._files = files
        self._root = root
        self._trash = trash
        self._leases = leases
        self._claims = claims
        self._workplaces = workplaces

    def place(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key of an artefact")
        return self._root / "arenas" / key

    def path(self, key: str) -> Path:
        return self.place(key) / ARENA_NAME

    # ---- finding -----------------------------------------------------------------------------

    def find(self, key: str, lease: Lease | None) -> LeasedArena | None:
        """The lease is the caller's to close on a miss. Raises nothing: what is bad is a miss."""
        arena = self._open(key)
        if arena is None and lease is not None:
            with suppress(OSError):
                self._trash.bring_back(self.place(key))
                arena = self._open(key)
        if arena is None:
            return None
        identity = self._identity(key)
        with suppress(OSError):
            self._files.touch(self.place(key) / USED_NAME)
        return LeasedArena(arena, lease, lambda: self._condemn(key, identity))

    def _open(self, key: str) -> Arena | None:
        identity = self._identity(key)
        if identity is None:
            return None
        try:
            arena = open_arena(self._files, self.path(key))
            if arena.header.key == key:
                return arena
            arena.close()
            raise BadArtefact(f"{arena.path} is the artefact {arena.header.key}")
        except BadArtefact as error:
            logger.warning("%s; it is built anew", error)
            self._condemn(key, identity)
        except OSError as error:
            logger.warning("%s cannot be opened: %s", self.path(key), error)
        return None

    def _condemn(self, key: str, identity: tuple[int, int] | None) -> None:
        """Not if another has taken its place meanwhile. What cannot be done now, the next does."""
        if identity is None or self._identity(key) != identity:
            return
        try:
            self._trash.condemn(self.place(key))
        except OSError as error:
            logger.warning("%s is bad and cannot be moved away: %s", self.path(key), error)

    def _identity(self, key: str) -> tuple[int, int] | None:
        """None: it is not there, or not to be seen."""
        try:
            found = self._files.stat(self.path(key))
        except OSError:
            return None
        return found.st_dev, found.st_ino

    # ---- building ----------------------------------------------------------------------------

    def publish(
        self,
        key: str,
        build: Build,
        specs: Sequence[TensorSpec],
        about: Mapping[str, str],
        chunk_bytes: int = CHUNK_BYTES,
    ) -> Path:
        """Raises CacheError, NotEnoughDisk, and what `build` raises."""
        name = PREFIX + key
        with ExitStack() as stack:
            with disk_errors(self._root):
                claimed = self._claims.claim(name, lambda: self._is_whole(key))
                claim = stack.enter_context(claimed)
                if claim is None or self._is_whole(key):
                    return self.path(key)
                work = self._workplaces.take(name, claim)
            path = work / ARENA_NAME
            with ArenaWriter(path, key, specs, about, self._files, chunk_bytes) as writer:
                build(writer)
            with disk_errors(self._root):
                self._move_in(work, key)
        return self.path(key)

    def _is_whole(self, key: str) -> bool:
        arena = self._open(key)
        if arena is None:
            return False
        arena.close()
        return True

    def _move_in(self, work: Path, key: str) -> None:
        try:
            self._rename_in(work, key)
        except OSError:
            if not self._is_whole(key):
                raise
            # Its equal is there: somebody else's, or ours, and the error was none.
            self._trash.condemn(work)
        self._files.sync_folder(work.parent)
        self._files.sync_folder(self._root / "arenas")

    def _rename_in(self, work: Path, key: str) -> None:
        with self._files.opened(work / USED_NAME, os.O_WRONLY | os.O_CREAT):
            pass
        self._files.sync_folder(work)
        for _ in range(NUM_TRIES - 1):
            try:
                return self._files.rename(work, self.place(key))
            except OSError as error:
                if error.errno not in TAKEN or self._is_whole(key):
                    raise
                self._trash.condemn(self.place(key))
        return self._files.rename(work, self.place(key))

    # ---- lists and removal -------------------------------------------------------------------

    def all_keys(self) -> list[str]:
        return [key for key in self._files.list(self._root / "arenas") if KEY.fullmatch(key)]

    def records(self) -> list[ArenaRecord]:
        found = []
        for key in self.all_keys():
            with suppress(FileNotFoundError):  # removed meanwhile
                found.append(self._record(key))
        return found

    def _record(self, key: str) -> ArenaRecord:
        about: Mapping[str, str] = {}
        with suppress(BadArtefact), open_arena(self._files, self.path(key)) as arena:
            about = arena.header.about
        num_bytes = self._files.stat(self.path(key)).st_size
        num_leases = 0
        with suppress(FileNotFoundError):  # a root made elsewhere, without a folder for them
            num_leases = self._leases.num_live(PREFIX + key)
        return ArenaRecord(key, num_bytes, self.used_at(key), num_leases, about)

    def used_at(self, key: str) -> float:
        try:
            return self._files.stat(self.place(key) / USED_NAME).st_mtime
        except OSError:
            return 0.0

    def remove(self, key: str) -> bool:
        """False: it is leased, and stays."""
        try:
            self._files.stat(self.place(key))
        except FileNotFoundError:
            return True
        return self._trash.throw(self.place(key))
