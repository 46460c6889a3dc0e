"""A folder on this machine: a checkpoint's own, or one in the layout of the Hugging Face hub cache.

Knows files; nothing of networks. The loader reads such a folder in place, so bytes move only when
somebody asks for a copy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ...engine.errors import SourceError
from .source import READ_BYTES, Listing, SourceChanged, SourceFile

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


class LocalSource:
    """The files of one folder."""

    def __init__(self, folder: Path) -> None:
        self._asked = folder
        self._folder = _snapshot(folder) or folder

    @property
    def text(self) -> str:
        return str(self._asked.absolute())

    @property
    def short_name(self) -> str:
        return hub_cache_name(self._asked) or self._asked.resolve().name

    def local_folder(self) -> Path:
        return self._folder

    def list_files(self) -> Listing:
        try:
            paths = sorted(path for path in self._folder.iterdir() if path.is_file())
            return Listing(tuple(described(path) for path in paths))
        except OSError as error:
            raise _unreadable(self._folder, error) from error

    def read(self, file: SourceFile, start: int = 0) -> Iterator[bytes]:
        return read_file(self._folder / file.name, file, start)

    def close(self) -> None:
        """A folder holds nothing open."""


def described(path: Path) -> SourceFile:
    """One file as it lies there. In a hub cache the name of the blob is its digest."""
    status = path.stat()
    version = f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
    return SourceFile(path.name, status.st_size, _blob_digest(path), version)


def _blob_digest(path: Path) -> str:
    """The hub cache names a blob by its ETag: the sha256 of an LFS file, else git's id."""
    blob = path.resolve()
    if not path.is_symlink() or blob.parent.name != "blobs":
        return ""
    if _SHA256.fullmatch(blob.name):
        return f"sha256:{blob.name}"
    return f"git-sha1:{blob.name}" if _SHA1.fullmatch(blob.name) else ""


def read_file(path: Path, file: SourceFile, start: int) -> Iterator[bytes]:
    """Bytes [start, end) of a file that must still be the one listed."""
    at = start
    try:
        if described(path).version != file.version and file.version:
            raise SourceChanged(f"{path} changed after it was listed")
        with path.open("rb") as content:
            content.seek(start)
            while piece := content.read(READ_BYTES):
                at += len(piece)
                yield piece
    except OSError as error:
        raise _unreadable(path, error) from error
    if at != file.num_bytes:
        raise SourceChanged(f"{path} has {at} B, {file.num_bytes} B when it was listed")


def _unreadable(path: Path, error: OSError) -> SourceError:
    return SourceError(f"{path} cannot be read: {error.strerror or error}")


# ---- the layout of the hub cache -------------------------------------------------------------


def hub_cache_name(folder: Path) -> str:
    """The model's name if the folder is `models--org--name` or a snapshot in it."""
    for part in (folder.absolute(), *folder.absolute().parents[:2]):
        if part.name.startswith("models--"):
            return part.name.split("--")[-1]
    return ""


def _snapshot(folder: Path) -> Path | None:
    """`models--org--name` stands for its snapshot of main, or for the only one there is."""
    if not folder.name.startswith("models--") or not (folder / "snapshots").is_dir():
        return None
    main = snapshot_of(folder, "main")
    found = sorted((folder / "snapshots").iterdir())
    return main or (found[0] if len(found) == 1 else None)


def snapshot_of(repo_folder: Path, revision: str) -> Path | None:
    """The snapshot that a branch, a tag or a commit names in this cache."""
    if ".." in Path(revision).parts:
        return None
    commit = revision
    ref = repo_folder / "refs" / revision
    if ref.is_file():
        commit = ref.read_text(encoding="utf-8").strip()
    if "/" in commit or commit in {"", ".", ".."}:
        return None
    snapshot = repo_folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None
