"""Fetched files in the store: `blobs/<sha256>`, and which of them make a source, `sources/<slug>`.

`models/<slug>/` are links to blobs (see views.py). A blob may go when no record names it and nobody
fetches: a fetch publishes its blobs before it writes the record. Knows no way to fetch.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from . import records
from .files import FileSystem
from .leases import Leases
from .records import SourceRecord
from .single_flight import Claims
from .trash import Trash

CLAIM_PREFIX = "source-"
RECORD_SUFFIX = ".json"
RESUMABLE = (".part", ".part.journal")
"""What a fetch leaves in partial/ to be continued; anything else there without owner is debris."""


@dataclass(frozen=True, slots=True)
class SourceUse:
    """One fetched source, for lists; `record` is None where it cannot be read."""

    slug: str
    num_bytes: int
    used_at: float
    num_leases: int
    record: SourceRecord | None = None


class Fetched:
    """All of a store. Methods raise OSError."""

    def __init__(
        self, files: FileSystem, root: Path, trash: Trash, leases: Leases, claims: Claims
    ) -> None:
        self._files = files
        self._root = root
        self._trash = trash
        self._leases = leases
        self._claims = claims

    # ---- blobs and records -------------------------------------------------------------------

    def blob_path(self, sha256: str) -> Path:
        return self._root / "blobs" / sha256

    def has_blob(self, sha256: str, num_bytes: int) -> bool:
        try:
            return self._files.stat(self.blob_path(sha256)).st_size == num_bytes
        except OSError:
            return False

    def publish_blob(self, path: Path, sha256: str) -> Path:
        """Moves a file in whose bytes are on the disk already. Its equal may be there: no error."""
        blob = self.blob_path(sha256)
        if self.has_blob(sha256, self._files.stat(path).st_size):
            self._files.unlink(path, missing_ok=True)
        else:
            self._files.rename(path, blob)
        self._files.sync_folder(blob.parent)
        return blob

    def record_path(self, slug: str) -> Path:
        return self._root / "sources" / f"{slug}{RECORD_SUFFIX}"

    def read_record(self, slug: str) -> SourceRecord | None:
        return records.read_record(self._files, self.record_path(slug))

    def write_record(self, slug: str, record: SourceRecord) -> None:
        self._files.write_atomically(self.record_path(slug), records.encode(record))

    # ---- lists -------------------------------------------------------------------------------

    def slugs(self) -> list[str]:
        names = self._files.list(self._root / "sources")
        return [n.removesuffix(RECORD_SUFFIX) for n in names if n.endswith(RECORD_SUFFIX)]

    def uses(self) -> list[SourceUse]:
        found = []
        for slug in self.slugs():
            with suppress(FileNotFoundError):  # removed meanwhile
                found.append(self._use(slug))
        return found

    def _use(self, slug: str) -> SourceUse:
        record = self.read_record(slug)
        used_at = self._files.stat(self.record_path(slug)).st_mtime
        num_bytes = record.num_bytes if record else 0
        num_leases = 0
        with suppress(FileNotFoundError):  # a root made elsewhere, without a folder for them
            num_leases = self._leases.num_live(CLAIM_PREFIX + slug)
        return SourceUse(slug, num_bytes, used_at, num_leases, record)

    # ---- removal -----------------------------------------------------------------------------

    def remove(self, slug: str) -> bool:
        """View, record, and the blobs that are nobody's then. False: leased, or being fetched."""
        if self._claims.is_claimed(CLAIM_PREFIX + slug):
            return False
        if not self._trash.throw(self._root / "models" / slug):
            return False
        self._files.unlink(self.record_path(slug), missing_ok=True)
        self.sweep()
        return True

    def is_blob_in_use(self, sha256: str) -> bool:
        return self._is_anything_fetched() or sha256 in self._named_blobs()

    def sweep(self) -> None:
        """Removes what a killed fetch or removal left and no later one needs."""
        if self._is_anything_fetched():
            return
        slugs = set(self.slugs())
        for slug in self._files.list(self._root / "models"):
            if slug not in slugs:
                self._trash.throw(self._root / "models" / slug)
        named = self._named_blobs()
        for sha256 in self._files.list(self._root / "blobs"):
            if sha256 not in named:
                self._trash.throw(self.blob_path(sha256))
        for name in self._unowned_partials():
            if not name.endswith(RESUMABLE):
                self._trash.throw(self._root / "partial" / name)

    def resumable(self) -> list[Path]:
        """Halves of files, which the next fetch would continue."""
        names = self._unowned_partials()
        return [self._root / "partial" / name for name in names if name.endswith(RESUMABLE)]

    def is_partial_in_use(self, name: str) -> bool:
        return "~" not in name and self._is_anything_fetched()

    def _unowned_partials(self) -> list[str]:
        return [name for name in self._files.list(self._root / "partial") if "~" not in name]

    def _is_anything_fetched(self) -> bool:
        return self._claims.any_claimed(CLAIM_PREFIX)

    def _named_blobs(self) -> set[str]:
        """Raises OSError if a record is there and cannot be read: it may name any blob."""
        named: set[str] = set()
        for slug in self.slugs():
            with suppress(FileNotFoundError, msgspec.MsgspecError):
                data = self._files.read(self.record_path(slug))
                record = msgspec.json.decode(data, type=SourceRecord)
                named.update(file.sha256 for file in record.files)
        return named
