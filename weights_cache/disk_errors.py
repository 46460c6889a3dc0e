"""What the file system refused, as errors that say what to do. Knows errno and the error tree."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..engine.errors import CacheError, NotEnoughDisk, SetupError

FULL = (errno.ENOSPC, errno.EDQUOT)
WAY_OUT = "make room with `pilotlight cache gc` or choose another disk with --cache"


def disk_error(path: Path, error: OSError) -> SetupError:
    if error.errno in FULL:
        return NotEnoughDisk(f"{path} is full; {WAY_OUT}")
    reason = error.strerror or str(error)
    return CacheError(f"{path} cannot be used: {reason}; look at the disk, or choose another one")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """OSErrors raised inside become CacheError or NotEnoughDisk; others pass."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error
