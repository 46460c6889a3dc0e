"""When this process began, and a boot as text: for the terminal, the log and /startup.

Knows an EngineStatus; knows no sockets.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ..engine.status import EngineState, EngineStatus, PhaseSpan

BAR_WIDTH = 28


def process_started_s() -> float:
    """time.monotonic() at the start of this process, the interpreter's own start included."""
    try:
        # Field 22 of stat(5), behind the command's closing parenthesis: ticks since boot.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        age_s = time.process_time()
    return time.monotonic() - age_s


def eta_s(status: EngineStatus, elapsed_s: float) -> float | None:
    """Seconds until the present phase's bytes are there, at its speed so far; None if unknown."""
    if status.state is EngineState.READY:
        return 0.0
    spent_s = elapsed_s - status.phase_started_s
    if status.state is not EngineState.LOADING or not status.bytes_done or spent_s <= 0.0:
        return None
    return spent_s * (status.bytes_total - status.bytes_done) / status.bytes_done


def startup_json(status: EngineStatus, state: str, elapsed_s: float) -> dict[str, Any]:
    """The boot for /startup: phases that ended, the present one, bytes."""
    return {
        "state": state,
        "reason": status.reason,
        "elapsed_s": round(elapsed_s, 4),
        "asked_s": round(status.asked_s, 4),
        "since_ask_s": round(elapsed_s - status.asked_s, 4),
        "phase": status.phase,
        "detail": status.detail,
        "bytes_done": status.bytes_done,
        "bytes_total": status.bytes_total,
        "eta_s": eta_s(status, elapsed_s),
        "artefact": status.facts.artefact if status.facts else "",
        "kv_cache_dtype": status.facts.kv_cache_dtype if status.facts else "",
        "num_restarts": status.num_restarts,
        "phases": [
            {"name": p.name, "started_s": round(p.started_s, 4), "s": round(p.duration_s, 4)}
            for p in status.phases
        ],
    }


def timeline_lines(phases: tuple[PhaseSpan, ...]) -> list[str]:
    """One line a phase, with a bar that shows when it ran; the last line says READY."""
    began_s = phases[0].started_s if phases else 0.0
    boot_s = phases[-1].ended_s - began_s if phases else 0.0
    lines = [_line(phase, began_s, boot_s) for phase in phases]
    since = "after it was asked for" if began_s else "after process start"
    return [*lines, f"  {'READY':<14}{boot_s:8.3f} s {since}"]


def _line(phase: PhaseSpan, began_s: float, boot_s: float) -> str:
    scale = BAR_WIDTH / boot_s if boot_s else 0.0
    before = min(BAR_WIDTH - 1, int((phase.started_s - began_s) * scale))
    width = max(1, min(BAR_WIDTH - before, round(phase.duration_s * scale)))
    bar = "." * before + "#" * width + "." * (BAR_WIDTH - before - width)
    return f"  {phase.name:<14}{phase.duration_s:8.3f} s  {bar}"
