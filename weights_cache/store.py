"""The store: one folder of artefacts, fetched files and what is known of them, shared by processes.

    VERSION   arenas/<key>/{arena.bin, plan.json, used}   blobs/ sources/ models/ (see fetched.py)
    digests/  leases/  claims/  partial/  trash/

Objects come and go whole, by renaming; any process may be killed at any point, and the next one
goes on. Raises CacheError and NotEnoughDisk. A root that cannot be written serves what is in it.
This file is the store's face and knows how its parts fit; each part is a file of its own.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from ..engine.errors import CacheError
from . import checked
from .arena import CHUNK_BYTES, TensorSpec
from .artefacts import PREFIX, USED_NAME, ArenaRecord, Artefacts, Build, LeasedArena
from .digests import Digests
from .disk_errors import disk_errors
from .eviction import NEVER_USED, Collected, Item, make_room
from .fetched import CLAIM_PREFIX, Fetched, SourceUse
from .files import ASIDE_SUFFIX, FileSystem
from .leases import Lease, Leases, OwnedFiles
from .liveness import THE_WORLD, Surroundings
from .records import SourceRecord
from .single_flight import Claims
from .trash import Trash
from .workplaces import Workplaces

logger = logging.getLogger(__name__)

T = TypeVar("T")

VERSION = 1
OBJECT_FOLDERS = ("arenas", "blobs", "models", "partial", "trash")
FOLDERS = (*OBJECT_FOLDERS, "sources", "digests", "leases", "claims")
PLAN_NAME = "plan.json"


class Version(msgspec.Struct, frozen=True):
    version: int


class Store:
    """Opening makes its folders where the root can be written. Any thread may call any method."""

    def __init__(
        self, root: Path, files: FileSystem | None = None, world: Surroundings = THE_WORLD
    ) -> None:
        self.root = root
        self.files = files or FileSystem()
        self._owned = OwnedFiles(self.files, world)
        self._leases = Leases(self._owned, root / "leases")
        self._claims = Claims(self._owned, root / "claims", world.pause)
        self._trash = Trash(self._owned, root, self._is_in_use)
        self._workplaces = Workplaces(self._owned, root / "partial", self._trash)
        self._artefacts = Artefacts(
            self.files, root, self._trash, self._leases, self._claims, self._workplaces
        )
        self._fetched = Fetched(self.files, root, self._trash, self._leases, self._claims)
        self._digests = Digests(self.files, root / "digests", root)
        self._is_writable = self._open()

    @property
    def is_writable(self) -> bool:
        """False: what is there is served, nothing is written, and nothing can be removed."""
        return self._is_writable

    def free_bytes(self) -> int:
        with disk_errors(self.root):
            return self.files.free_bytes(self.root)

    def num_bytes(self) -> int:
        """Of all objects on the disk; files of several names count once."""
        found: dict[tuple[int, int], int] = {}
        with disk_errors(self.root):
            for folder in OBJECT_FOLDERS:
                self._measure(self.root / folder, found)
        return sum(found.values())

    # ---- artefacts ---------------------------------------------------------------------------

    def find_arena(self, key: str) -> LeasedArena | None:
        """Open, checked as far as its header goes, and leased. What is damaged is a miss."""
        self._artefacts.place(key)
        lease = self._lease(PREFIX + key)
        found = None
        try:
            found = self._artefacts.find(key, lease)
        finally:
            if found is None and lease is not None:
                lease.close()
        return found

    def publish_arena(
        self,
        key: str,
        build: Build,
        specs: Sequence[TensorSpec],
        about: Mapping[str, str],
        chunk_bytes: int = CHUNK_BYTES,
    ) -> Path:
        """Builds it, or waits for whoever does; at once where it is there.

        `build` writes all tensors in order; it may skip what `ArenaWriter.is_written` says an
        earlier, interrupted build left. What it raises comes out here, and leaves its work.
        """
        self._require_writable()
        return self._artefacts.publish(key, build, specs, about, chunk_bytes)

    def arenas(self) -> list[ArenaRecord]:
        with disk_errors(self.root):
            return self._listed(self._artefacts.records)

    def remove(self, key: str) -> bool:
        """True: it is gone, or never was. False: it is leased, and stays."""
        self._require_writable()
        with disk_errors(self.root):
            return self._artefacts.remove(key)

    def read_plan(self, key: str) -> bytes | None:
        """As it was written, or not at all."""
        plan = checked.read(self.files, self._artefacts.place(key) / PLAN_NAME, msgspec.Raw)
        return None if plan is None else bytes(plan)

    def write_plan(self, key: str, plan: bytes) -> None:
        """JSON, beside the artefact; forgotten with it. Not being able to is no error."""
        content = checked.encode(msgspec.Raw(plan))
        if checked.decode(content, msgspec.Raw) is None:
            raise ValueError("the plan is not JSON")
        with self._optional(f"the plan of {key}"):
            self.files.write_atomically(self._artefacts.place(key) / PLAN_NAME, content)

    # ---- fetched files -----------------------------------------------------------------------

    def read_record(self, slug: str) -> SourceRecord | None:
        return self._fetched.read_record(slug)

    def write_record(self, slug: str, record: SourceRecord) -> None:
        with disk_errors(self.root):
            self._fetched.write_record(slug, record)

    def blob_path(self, sha256: str) -> Path:
        return self._fetched.blob_path(sha256)

    def has_blob(self, sha256: str, num_bytes: int) -> bool:
        return self._fetched.has_blob(sha256, num_bytes)

    def publish_blob(self, path: Path, sha256: str) -> Path:
        """Moves a file in; its bytes must be on the disk, and their sha256 be true."""
        with disk_errors(self.root):
            return self._fetched.publish_blob(path, sha256)

    def sources(self) -> list[SourceUse]:
        with disk_errors(self.root):
            return self._listed(self._fetched.uses)

    def remove_source(self, slug: str) -> bool:
        """Record, view, and the blobs that no other record names. False: in use, and stays."""
        self._require_writable()
        with disk_errors(self.root):
            return self._fetched.remove(slug)

    # ---- both --------------------------------------------------------------------------------

    @contextmanager
    def claim(self, name: str) -> Iterator[None]:
        """Waits until no other process or thread works on `name`. Fetches claim `source-<slug>`."""
        self._require_writable()
        with ExitStack() as stack:
            with disk_errors(self.root):
                stack.enter_context(self._claims.claim(name))
            yield

    @contextmanager
    def lease(self, name: str) -> Iterator[None]:
        """Meanwhile `source-<slug>` or `arena-<key>` is not evicted; and it counts as used now."""
        lease = self._lease(name)
        try:
            with suppress(OSError):
                self.files.touch(self._sign_of_use(name))
            yield
        finally:
            if lease is not None:
                lease.close()

    def collect_garbage(self, high_bytes: int, low_bytes: int) -> Collected:
        """Removes debris always; what was used least recently if there are more than `high_bytes`,
        until `low_bytes` are left. Nothing that is leased, claimed or being fetched."""
        self._require_writable()
        for sweep in (
            self._leases.sweep, self._claims.sweep, self._trash.empty, self._fetched.sweep,
            self._digests.sweep, self._sweep_asides,
        ):  # fmt: skip
            try:
                sweep()
            except OSError as error:
                logger.warning("%s: not all debris can be removed: %s", self.root, error)
        with disk_errors(self.root):
            return make_room(self._items(), self.num_bytes, high_bytes, low_bytes)

    # ---- digests of local files --------------------------------------------------------------

    def digest_of(self, path: Path) -> str | None:
        """The sha256 of a file that has not changed since it was remembered."""
        return self._digests.find(path)

    def remember_digest(self, path: Path, sha256: str) -> None:
        """`sha256` is of what is there now. Not being able to is no error."""
        if self.is_writable:
            self._digests.remember(path, sha256)

    def sha256_of(self, path: Path, on_bytes: Callable[[int], None] = lambda _num: None) -> str:
        """Remembered, or hashed now. Raises OSError where the file cannot be read."""
        return self._digests.of(path, on_bytes)

    # ---- opening -----------------------------------------------------------------------------

    def _open(self) -> bool:
        """Whether the root can be written; then everything is in it. Raises CacheError."""
        found = self._read_version()
        if found is not None and found.version != VERSION:
            raise CacheError(
                f"{self.root} is a cache of version {found.version}, this is version {VERSION}; "
                "choose another folder with --cache"
            )
        if found is not None and not self.files.is_writable(self.root):
            return False
        try:
            self._make(is_new=found is None)
        except OSError as error:
            logger.info("%s cannot be written: %s", self.root, error)
            return False
        return True

    def _read_version(self) -> Version | None:
        """None: a new root, or a damaged file, which is written again."""
        with disk_errors(self.root):
            try:
                return checked.decode(self.files.read(self.root / "VERSION"), Version)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def _make(self, is_new: bool) -> None:
        self.files.make_folders(self.root)
        for name in FOLDERS:
            self.files.make_folder(self.root / name)
        if is_new:
            content = checked.encode(Version(VERSION))
            self.files.write_atomically(self.root / "VERSION", content)

    def _require_writable(self) -> None:
        if not self.is_writable:
            raise CacheError(f"{self.root} cannot be written; choose another folder with --cache")

    # ---- use ---------------------------------------------------------------------------------

    def _lease(self, name: str) -> Lease | None:
        """A disk that takes no lease, being full for example, still serves what is on it."""
        if not self.is_writable:
            return None
        try:
            return self._leases.take(name)
        except OSError as error:
            logger.warning("no lease on %s can be written: %s", name, error)
            return None

    def _is_in_use(self, place: Path) -> bool:
        """What the trash asks before it deletes, and again when it has moved the object away."""
        folder, name = place.parent.name, place.name
        if folder == "arenas":
            return self._leases.num_live(PREFIX + name) > 0
        if folder == "models":
            return self._leases.num_live(CLAIM_PREFIX + name) > 0
        if folder == "blobs":
            return self._fetched.is_blob_in_use(name)
        return folder == "partial" and self._fetched.is_partial_in_use(name)

    def _sign_of_use(self, name: str) -> Path:
        if name.startswith(CLAIM_PREFIX):
            return self._fetched.record_path(name.removeprefix(CLAIM_PREFIX))
        return self._artefacts.place(name.removeprefix(PREFIX)) / USED_NAME

    # ---- garbage -----------------------------------------------------------------------------

    def _items(self) -> Iterator[Item]:
        """All that may go. What is unfinished goes first."""
        for name in sorted(self._workplaces.names()):
            yield Item(f"partial/{name}", NEVER_USED, partial(self._discard, name))
        for path in self._fetched.resumable():
            yield Item(f"partial/{path.name}", NEVER_USED, partial(self._trash.throw, path))
        for key in self._artefacts.all_keys():
            used_at = self._artefacts.used_at(key)
            yield Item(f"arenas/{key}", used_at, partial(self._artefacts.remove, key))
        for use in self._fetched.uses():
            remove = partial(self._fetched.remove, use.slug)
            yield Item(f"sources/{use.slug}", use.used_at, remove)

    def _discard(self, name: str) -> bool:
        """An unfinished artefact, unless somebody is at it."""
        claim = self._claims.try_claim(name)
        if claim is None:
            return False
        try:
            return self._workplaces.discard(name)
        finally:
            claim.close()

    def _measure(self, path: Path, found: dict[tuple[int, int], int]) -> None:
        try:
            entry = self.files.stat(path)
            if not stat.S_ISDIR(entry.st_mode):
                found[entry.st_dev, entry.st_ino] = entry.st_size
                return
            for name in self.files.list(path):
                self._measure(path / name, found)
        except FileNotFoundError:
            return

    def _sweep_asides(self) -> None:
        """Small files that were written aside by a process that was killed before it renamed."""
        folders = [self.root, self.root / "sources", self.root / "digests"]
        folders += [self._artefacts.place(key) for key in self._artefacts.all_keys()]
        for folder in folders:
            for name in self.files.list(folder):
                path = folder / name
                if name.endswith(ASIDE_SUFFIX) and self._owned.watch.is_still(str(path), None):
                    self.files.unlink(path, missing_ok=True)

    # ---- errors ------------------------------------------------------------------------------

    @contextmanager
    def _optional(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.info("%s cannot be written: %s", what, error)

    def _listed(self, entries: Callable[[], list[T]]) -> list[T]:
        """Empty where the root was never made."""
        try:
            return entries()
        except FileNotFoundError:
            return []
