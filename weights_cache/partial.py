"""A file on its way in: appended, hashed as it passes, and picked up again after any end.

Beside the bytes lies a journal of how many of them are on the disk and what their sha256 is. What
the journal vouches for is hashed again before it is continued; what it does not is cut off. So a
killed process or a lost power supply costs at most `STEP_BYTES`, and never leaves bad bytes.
Knows of a source only what it lists of a file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from .files import FileSystem
from .sources.source import SourceFile

STEP_BYTES = 64 << 20
"""Bytes between two journal entries: one fsync each."""

READ_BYTES = 4 << 20
GIT = "git-sha1:"


class Journal(msgspec.Struct, frozen=True):
    """`num_bytes` are on the disk, and this is their sha256."""

    num_bytes: int
    sha256: str


class Hashes:
    """The digests of one file as it passes: sha256, and git's where git's is published."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        is_git = file.digest.startswith(GIT)
        self._git = hashlib.sha1(b"blob %d\0" % file.num_bytes) if is_git else None

    def update(self, piece: bytes) -> None:
        self._sha256.update(piece)
        if self._git is not None:
            self._git.update(piece)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def published(self) -> str:
        """What the published digest should be; empty where there is none to compare with."""
        if self._git is not None:
            return GIT + self._git.hexdigest()
        return f"sha256:{self.sha256}" if self._file.digest else ""


class PartialFile:
    """Open from construction to `close`; one writer, which the store's claim promises."""

    def __init__(self, files: FileSystem, path: Path, file: SourceFile) -> None:
        self.path = path
        self.num_bytes = 0
        self._files = files
        self._journal_path = path.with_name(path.name + ".journal")
        self._file = file
        self._num_journalled = 0
        self.hashes = Hashes(file)
        self._descriptor = files.open(path, os.O_RDWR | os.O_CREAT)

    def resume(self, on_bytes: Callable[[int], None]) -> int:
        """Keeps what the journal vouches for, and returns how many bytes that is."""
        journal = self._read_journal()
        if journal is not None:
            self._hash_first(journal.num_bytes, on_bytes)
            if (self.num_bytes, self.hashes.sha256) != (journal.num_bytes, journal.sha256):
                on_bytes(-self.num_bytes)
                self._forget()
        self._files.ftruncate(self._descriptor, self.num_bytes)
        self._num_journalled = self.num_bytes
        return self.num_bytes

    def append(self, piece: bytes) -> None:
        self._files.write_all(self._descriptor, piece, self.num_bytes)
        self.hashes.update(piece)
        self.num_bytes += len(piece)
        if self.num_bytes - self._num_journalled >= STEP_BYTES:
            self.save()

    def save(self) -> None:
        """After this, a later `resume` goes on from here."""
        if self.num_bytes == self._num_journalled:
            return
        self.sync()
        journal = Journal(self.num_bytes, self.hashes.sha256)
        self._files.write_atomically(self._journal_path, msgspec.json.encode(journal))
        self._num_journalled = self.num_bytes

    def sync(self) -> None:
        self._files.fsync(self._descriptor)

    def restart(self) -> None:
        """From nothing."""
        self._forget()
        self._files.ftruncate(self._descriptor, 0)

    def discard(self) -> None:
        """What is here will not be continued."""
        self._forget()
        self._files.unlink(self.path)

    def close(self) -> None:
        self._files.close(self._descriptor)

    def forget_journal(self) -> None:
        self._files.unlink(self._journal_path, missing_ok=True)

    def _forget(self) -> None:
        self.hashes = Hashes(self._file)
        self.num_bytes = self._num_journalled = 0
        self.forget_journal()

    def _hash_first(self, num_bytes: int, on_bytes: Callable[[int], None]) -> None:
        while self.num_bytes < num_bytes:
            wanted = min(READ_BYTES, num_bytes - self.num_bytes)
            piece = self._files.pread(self._descriptor, wanted, self.num_bytes)
            if not piece:
                return
            self.hashes.update(piece)
            self.num_bytes += len(piece)
            on_bytes(len(piece))

    def _read_journal(self) -> Journal | None:
        try:
            journal = msgspec.json.decode(self._files.read(self._journal_path), type=Journal)
        except (OSError, msgspec.MsgspecError):
            return None
        return journal if 0 < journal.num_bytes <= self._file.num_bytes else None
