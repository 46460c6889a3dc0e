"""A file's pages taken out of memory, and the proof that they are gone. Knows files only."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from ..engine.errors import ConfigError
from ..weights_cache.pages import num_resident

MAX_RESIDENT = 0.01


def drop_pages(files: Sequence[Path]) -> float:
    """Returns the fraction of their pages still in memory, below MAX_RESIDENT, or ConfigError.

    Synced first: a page that is not on storage yet cannot be dropped.
    """
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    fraction = resident_fraction(files)
    if fraction >= MAX_RESIDENT:
        raise ConfigError(
            f"--drop-cache: {fraction:.1%} of the pages of {', '.join(map(str, files))} are still"
            f" in memory, the limit is {MAX_RESIDENT:.0%}: a process maps them, or the file system"
            " keeps them in memory; end that process, or use a folder on a disk"
        )
    return fraction


def resident_fraction(files: Sequence[Path]) -> float:
    """Of all pages of these files, by mincore(2)."""
    counts = [_pages(file) for file in files if file.stat().st_size]
    return sum(n for n, _ in counts) / max(1, sum(total for _, total in counts))


def _pages(file: Path) -> tuple[int, int]:
    with file.open("rb") as opened:
        with mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            return num_resident(mapping), -(-len(mapping) // mmap.PAGESIZE)
