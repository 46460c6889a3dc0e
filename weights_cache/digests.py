"""Digests of local files, remembered by what `stat` says of them, so that no boot hashes twice.

A file that was changed within the file system's own clock tick looks the same: so what was changed
just before its digest was remembered is not believed (as git does with its index). Files inside
the store are the store's own; nobody changes them in place.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from . import checked
from .files import FileSystem

logger = logging.getLogger(__name__)

READ_BYTES = 4 << 20
SETTLE_NS = 2_000_000_000
"""The coarsest time stamps that are still in use are those of FAT: two seconds."""


class Digest(msgspec.Struct, frozen=True):
    """`identity` in full: the name of the record is only a hash of it."""

    path: str
    identity: str
    sha256: str


class Digests:
    """Records in `folder`; `own` is the folder whose files nobody else writes."""

    def __init__(self, files: FileSystem, folder: Path, own: Path) -> None:
        self._files = files
        self._folder = folder
        self._own = own

    def find(self, path: Path) -> str | None:
        try:
            identity, changed_ns = self._identity(path)
            record = self._record(identity)
            found = checked.decode(self._files.read(record), Digest)
            remembered_ns = self._files.stat(record).st_mtime_ns
        except OSError:
            return None
        if found is None or found.identity != identity:
            return None
        return found.sha256 if changed_ns + SETTLE_NS <= remembered_ns else None

    def remember(self, path: Path, sha256: str) -> None:
        """`sha256` is of what is there now; what cannot be written is only not remembered."""
        try:
            identity, _ = self._identity(path)
            content = checked.encode(Digest(str(path), identity, sha256))
            self._files.write_atomically(self._record(identity), content)
        except OSError as error:
            logger.debug("the digest of %s is not remembered: %s", path, error)

    def of(self, path: Path, on_bytes: Callable[[int], None]) -> str:
        """Found, or hashed now and remembered. Raises OSError where the file cannot be read."""
        known = self.find(path)
        if known is not None:
            return known
        before = self._identity(path)
        sha256 = self._hash(path, on_bytes)
        if self._identity(path) == before:  # else somebody writes to it: as good as it gets
            self.remember(path, sha256)
        return sha256

    def sweep(self) -> None:
        """Removes what was remembered of files that are other files now."""
        for name in self._files.list(self._folder):
            record = self._folder / name
            found = checked.read(self._files, record, Digest)
            if found is not None:
                with suppress(OSError):  # not there now: it may be mounted again later
                    if self._identity(Path(found.path))[0] != found.identity:
                        self._files.unlink(record, missing_ok=True)

    def _hash(self, path: Path, on_bytes: Callable[[int], None]) -> str:
        digest, done = hashlib.sha256(), 0
        buffer = memoryview(bytearray(READ_BYTES))
        with self._files.opened(path, os.O_RDONLY) as descriptor:
            while num_bytes := self._files.pread_into(descriptor, buffer, done):
                digest.update(buffer[:num_bytes])
                done += num_bytes
                on_bytes(done)
        return digest.hexdigest()

    def _record(self, identity: str) -> Path:
        name = hashlib.sha256(identity.encode()).hexdigest()[:32]
        return self._folder / f"{name}.json"

    def _identity(self, path: Path) -> tuple[str, int]:
        """And when it was changed, by its file system's clock; 0: long ago."""
        found = self._files.stat(path)
        parts = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]
        is_own = path.resolve().is_relative_to(self._own.resolve())
        if not is_own:
            parts.append(found.st_ctime_ns)
        return "-".join(map(str, parts)), 0 if is_own else found.st_ctime_ns
