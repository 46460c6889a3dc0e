"""A boot on a terminal: one line that moves, then the timeline. Knows an EngineClient's status."""

from __future__ import annotations

import sys
from typing import TextIO

from ..engine.client import EngineClient
from ..engine.status import EngineState, EngineStatus
from .timeline import timeline_lines

CLEAR_LINE = "\r\x1b[K"


async def follow_boot(engine: EngineClient, out: TextIO = sys.stderr) -> None:
    """Prints until cancelled: progress while loading, the timeline at each READY."""
    was = None
    async for status in engine.status_changes():
        if status.state is EngineState.READY and was is not EngineState.READY:
            weights = status.facts.weights if status.facts else None
            lines = timeline_lines(status.phases, status.beside, weights)
            print(CLEAR_LINE + "\n".join(lines), file=out, flush=True)
        elif status.state is EngineState.STALLED and was is not EngineState.STALLED:
            print(f"{CLEAR_LINE}  STALLED: {status.reason}", file=out, flush=True)
        elif status.state not in (EngineState.READY, EngineState.STALLED):
            print(CLEAR_LINE + progress_line(status), end="", file=out, flush=True)
        was = status.state


def progress_line(status: EngineStatus) -> str:
    line = f"  {status.state.upper():<9}{status.phase or status.reason}"
    if status.bytes_total and status.state is EngineState.LOADING:
        done = status.bytes_done / status.bytes_total
        line += f" {done:4.0%} of {status.bytes_total / 1e6:.1f} MB"
    return line
