"""What every source answers: which files there are, and their bytes from any position on.

Knows no protocol and writes nothing. `parse.py` turns an operator's text into a source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...engine.errors import SourceError

READ_BYTES = 1 << 20
"""How much a source hands over at most in one piece."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_+=@,()-][A-Za-z0-9_.+=@,() -]{0,254}")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source, as listed: `version` is how the source tells two contents apart."""

    name: str
    num_bytes: int
    digest: str = ""
    """As published, "sha256:<hex>" or "git-sha1:<hex>"; empty where the source publishes none."""
    version: str = ""
    """An ETag, a commit, a time of change; empty where the source gives none."""

    @property
    def sha256(self) -> str:
        """The published sha256, or nothing."""
        return self.digest.removeprefix("sha256:") if self.digest.startswith("sha256:") else ""


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a source at one moment; `revision` names that moment where the source can."""

    files: tuple[SourceFile, ...]
    revision: str = ""

    def file(self, name: str) -> SourceFile | None:
        return next((file for file in self.files if file.name == name), None)


class SourceChanged(SourceError):
    """A file is no longer the one that was listed: list again and start that file anew."""


class Source(Protocol):
    """A place that holds one checkpoint. All methods may be called from several threads."""

    @property
    def text(self) -> str:
        """As an operator would write it, without credentials; `parse_source` reads it again."""

    @property
    def short_name(self) -> str:
        """A name for people, made from the last part of the place."""

    def local_folder(self) -> Path | None:
        """The folder to read in place, where no bytes need to move at all."""

    def list_files(self) -> Listing:
        """The files that are there now. Raises SourceError."""

    def read(self, file: SourceFile, start: int = 0) -> Iterator[bytes]:
        """The bytes [start, file.num_bytes): all of them, or SourceError; SourceChanged if stale.

        A source that travels a network tries again by itself, from where the bytes ended.
        """

    def close(self) -> None:
        """Gives connections back."""


def is_plain_name(name: str) -> bool:
    """Whether a name from elsewhere is one file of one folder: no path, no dot file, no control."""
    return _PLAIN_NAME.fullmatch(name) is not None
