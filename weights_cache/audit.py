"""Everything of a store hashed again and compared with its name: `pilotlight cache verify`.

Takes a lease on what it reads. Finds; removes nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engine.errors import BadArtefact
from .inventory import ARTEFACT, Entry
from .records import RecordedFile
from .store import Store
from .verify import verify_chunks

READ_BYTES = 8 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """`problem` is empty where every byte is what it should be."""

    name: str
    problem: str


def audit(store: Store, entries: Sequence[Entry], on_progress: Progress) -> list[Finding]:
    """One finding for each entry. Raises nothing for bad bytes: that is what it finds."""
    total = sum(entry.num_bytes for entry in entries)
    findings: list[Finding] = []
    before = 0

    def on_bytes(num_done: int) -> None:
        on_progress(before + num_done, total)

    for entry in entries:
        on_bytes(0)
        check = _artefact if entry.kind == ARTEFACT else _source
        findings.append(Finding(entry.name, check(store, entry, on_bytes)))
        before += entry.num_bytes
    on_bytes(0)
    return findings


def _artefact(store: Store, entry: Entry, on_bytes: Callable[[int], None]) -> str:
    try:
        leased = store.find_arena(entry.name)
        if leased is None:
            return "cannot be opened"
        try:
            verify_chunks(leased.arena, on_bytes)
        finally:
            leased.close()
    except BadArtefact as error:
        return str(error)
    return ""


def _source(store: Store, entry: Entry, on_bytes: Callable[[int], None]) -> str:
    if entry.record is None:
        return "its record cannot be read"
    done = 0
    with store.lease(f"source-{entry.name}"):
        for file in entry.record.files:
            problem = _file(store, entry.path, file)
            if problem:
                return problem
            done += file.num_bytes
            on_bytes(done)
    return ""


def _file(store: Store, folder: Path, file: RecordedFile) -> str:
    """A blob, and the view's file where it is not the same file on the disk."""
    blob, shown = store.blob_path(file.sha256), folder / file.name
    try:
        if _sha256(store, blob) != file.sha256:
            return f"{file.name}: the bytes of {blob} are not what they were"
        if not shown.samefile(blob) and _sha256(store, shown) != file.sha256:
            return f"{shown} is not what was fetched"
    except OSError as error:
        return f"{file.name}: {error.strerror}"
    return ""


def _sha256(store: Store, path: Path) -> str:
    digest, at = hashlib.sha256(), 0
    with store.files.opened(path, os.O_RDONLY) as descriptor:
        while piece := store.files.pread(descriptor, READ_BYTES, at):
            digest.update(piece)
            at += len(piece)
    return digest.hexdigest()
