"""What is known of a fetched source: `sources/<slug>.json`, one file each.

A record is written after every blob that it names, so it is the sign that all are there; the disk
still decides. Knows names and digests; moves no bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from .files import FileSystem
from .sources.source import SourceFile

_UNUSUAL = re.compile(r"[^A-Za-z0-9._-]+")
MAX_NAME_CHARS = 80


class RecordedFile(msgspec.Struct, frozen=True):
    """One file: `sha256` is the blob's name, `version` what the source called this content."""

    name: str
    sha256: str
    num_bytes: int
    version: str = ""

    def is_of(self, file: SourceFile) -> bool:
        """Whether a listed file is this content, as far as its source can tell."""
        if (self.name, self.num_bytes) != (file.name, file.num_bytes):
            return False
        if file.sha256:
            return file.sha256 == self.sha256
        return bool(file.version) and file.version == self.version


class SourceRecord(msgspec.Struct, frozen=True):
    """`source` as an operator would write it; `revision` as the source resolved it."""

    source: str
    revision: str
    files: tuple[RecordedFile, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def file(self, name: str) -> RecordedFile | None:
        return next((file for file in self.files if file.name == name), None)

    def is_of(self, files: Iterable[SourceFile]) -> bool:
        listed = list(files)
        known = [self.file(file.name) for file in listed]
        pairs = zip(known, listed, strict=True)
        return len(listed) == len(self.files) and all(
            k is not None and k.is_of(f) for k, f in pairs
        )


def slug_of(text: str, short_name: str) -> str:
    """A folder's name for a source: readable, and different for every source."""
    name = _UNUSUAL.sub("-", short_name).strip("-.")[:MAX_NAME_CHARS] or "model"
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def read_record(files: FileSystem, path: Path) -> SourceRecord | None:
    """None where there is none, or none that can be read: fetching writes it anew."""
    try:
        return decode(files.read(path))
    except OSError:
        return None


def decode(content: bytes) -> SourceRecord | None:
    """None where the content is damaged."""
    try:
        return msgspec.json.decode(content, type=SourceRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def encode(record: SourceRecord) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=1)


def name_of(slug: str) -> str:
    """The readable part of a slug."""
    return slug.rpartition("-")[0]
