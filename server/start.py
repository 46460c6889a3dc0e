"""The first moments of `pilotlight serve`: an engine is started before anything else is imported.

The engine needs a second for torch, and this process half of one for the command line, gRPC and
their friends: they pass side by side. Imports nothing heavy itself.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..engine.spawn import Spawned, spawn

if TYPE_CHECKING:
    from .config import ServeConfig


def early_engine(words: list[str]) -> Spawned | None:
    """An engine process for a command line that serves; what turns out to be wrong discards it."""
    is_wanted = words[:1] == ["serve"] and not {"-h", "--help"} & set(words)
    return spawn() if is_wanted else None


def main(config: ServeConfig, spawned: Spawned | None) -> int:
    """Runs a server to its end; returns the exit code."""
    spawned = spawned or spawn()
    from .main import run
    from .timeline import process_started_s

    try:
        return run(config, process_started_s(), spawned, imported_s=time.monotonic())
    finally:
        spawned.discard()
