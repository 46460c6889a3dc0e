"""Folders that a loader can open, made of blobs: `models/<slug>/<name>/` with real files.

Hard links, so that a view costs no bytes; copies where the file system refuses links. Built aside
and moved into place whole, so a server that opened the old one keeps it. Knows records and blobs;
nothing of sources.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from .records import RecordedFile, SourceRecord, name_of
from .store import Store

COPY_BYTES = 8 << 20


def view_folder(store: Store, slug: str) -> Path:
    return store.root / "models" / slug / name_of(slug)


def is_whole(store: Store, slug: str, record: SourceRecord) -> bool:
    """Whether the folder holds exactly the record's files, by name and length."""
    folder = view_folder(store, slug)
    wanted = {file.name: file.num_bytes for file in record.files}
    try:
        found = {path.name: store.files.stat(path).st_size for path in folder.iterdir()}
    except OSError:
        return False
    return found == wanted


def make_view(store: Store, slug: str, record: SourceRecord) -> Path:
    """Builds the folder anew from the blobs, and puts it in the place of an older one."""
    files = store.files
    aside = store.root / "partial" / f"{slug}.view-{secrets.token_hex(4)}"
    folder = aside / name_of(slug)
    for made in (aside, folder):
        files.mkdir(made)
    for file in record.files:
        _place(store, file, folder / file.name)
    files.sync_folder(folder)
    place = store.root / "models" / slug
    with suppress(FileNotFoundError):
        files.rename(place, store.root / "trash" / aside.name)
    files.rename(aside, place)
    files.sync_folder(place.parent)
    _remember_digests(store, slug, record)
    return view_folder(store, slug)


def _remember_digests(store: Store, slug: str, record: SourceRecord) -> None:
    """So that the first boot need not hash what was hashed on its way in."""
    for file in record.files:
        store.remember_digest(view_folder(store, slug) / file.name, file.sha256)


def _place(store: Store, file: RecordedFile, path: Path) -> None:
    blob = store.blob_path(file.sha256)
    try:
        store.files.link(blob, path)
    except OSError:
        _copy(store, blob, path)


def _copy(store: Store, blob: Path, path: Path) -> None:
    files, at = store.files, 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with files.opened(blob, os.O_RDONLY) as source, files.opened(path, flags) as sink:
        while piece := files.pread(source, COPY_BYTES, at):
            files.write_all(sink, piece, at)
            at += len(piece)
        files.fsync(sink)


def links_work(store: Store) -> bool:
    """Tried out, because nothing tells."""
    files = store.files
    first = store.root / "partial" / f"link-{secrets.token_hex(4)}"
    second = first.with_suffix(".2")
    files.close(files.open(first, os.O_WRONLY | os.O_CREAT))
    try:
        files.link(first, second)
        files.unlink(second)
    except OSError:
        return False
    finally:
        files.unlink(first)
    return True
