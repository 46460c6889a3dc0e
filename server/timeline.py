"""When this process began, and a boot as text: for the terminal, the log and /startup.

Knows an EngineStatus; knows no sockets.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import msgspec

from ..engine.messages import WeightsFacts
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
        "weights": msgspec.structs.asdict(status.facts.weights) if status.facts else {},
        "attributed": round(status.attributed, 4),
        "kv_cache_dtype": status.facts.kv_cache_dtype if status.facts else "",
        "quantisation": status.facts.quantisation if status.facts else "",
        "num_restarts": status.num_restarts,
        "phases": [_span_json(span) for span in status.phases],
        "beside": [{**_span_json(span), "lane": span.lane} for span in status.beside],
    }


def _span_json(span: PhaseSpan) -> dict[str, Any]:
    started_s, duration_s = round(span.started_s, 4), round(span.duration_s, 4)
    return {"name": span.name, "started_s": started_s, "s": duration_s}


def timeline_lines(
    phases: tuple[PhaseSpan, ...],
    beside: tuple[PhaseSpan, ...] = (),
    weights: WeightsFacts | None = None,
) -> list[str]:
    """One line a phase, with a bar that shows when it ran; then what ran beside them."""
    began_s = phases[0].started_s if phases else 0.0
    boot_s = phases[-1].ended_s - began_s if phases else 0.0
    since = "it was asked for" if began_s else "process start"
    spans = sorted(beside, key=lambda span: (span.lane, span.started_s))
    return [
        *(_line(phase, began_s, boot_s) for phase in phases),
        *(_line(span, began_s, boot_s, span.lane) for span in spans),
        *_weights_lines(weights),
        f"  {'READY':<14}{boot_s:8.3f} s after {since}",
    ]


def _weights_lines(w: WeightsFacts | None) -> list[str]:
    if w is None or not w.source:
        return []
    cached = f", {w.page_cache_fraction:.0%} in memory before" if w.page_cache_fraction >= 0 else ""
    counts = f"{w.mapped_bytes / 1e6:.1f} MB mapped, {w.copied_bytes / 1e6:.1f} MB copied"
    return [
        f"  weights of the {w.source}: {counts}, {w.verified_bytes / 1e6:.1f} MB verified{cached}"
    ]


def _line(phase: PhaseSpan, began_s: float, boot_s: float, lane: str = "") -> str:
    scale = BAR_WIDTH / boot_s if boot_s else 0.0
    before = min(BAR_WIDTH - 1, int((phase.started_s - began_s) * scale))
    width = max(1, min(BAR_WIDTH - before, round(phase.duration_s * scale)))
    bar = "." * before + ("-" if lane else "#") * width + "." * (BAR_WIDTH - before - width)
    beside = f"  beside, in {lane}" if lane else ""
    return f"  {phase.name:<14}{phase.duration_s:8.3f} s  {bar}{beside}"
