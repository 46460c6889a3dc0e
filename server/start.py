"""The first moment of `pilotlight serve`: an engine is started before anything else is imported.

The engine needs a second for torch, and this process half of one for gRPC and its friends: they
pass side by side. Imports nothing heavy itself.
"""

from __future__ import annotations

from ..engine.spawn import spawn
from .config import ServeConfig
from .timeline import process_started_s


def main(config: ServeConfig) -> int:
    """Runs a server to its end; returns the exit code."""
    started_s = process_started_s()
    spawned = spawn(config.log_level)
    from .main import run

    return run(config, started_s, spawned)
