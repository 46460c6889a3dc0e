"""Turns what an engine says while it boots into an EngineStatus. Knows no process and no clock."""

from __future__ import annotations

from msgspec.structs import replace

from .messages import Progress, Ready
from .status import EngineState, EngineStatus, PhaseSpan

LAUNCH_PHASE = "start_engine"
"""From launch to the engine's first word: the interpreter starts and imports the plain modules."""

LOADING_PHASES = frozenset({"load_weights", "bind_kernels", "allocate_kv"})
WARMING_PHASES = frozenset({"warm"})


def launched(status: EngineStatus, at_s: float) -> EngineStatus:
    """A boot begins, the first or another; `at_s` in seconds since the server started."""
    return EngineStatus(
        state=EngineState.STARTING,
        phase=LAUNCH_PHASE,
        phase_started_s=at_s,
        phases=status.phases if status.num_restarts == 0 else (),
        num_restarts=status.num_restarts,
    )


def advanced(status: EngineStatus, progress: Progress, at_s: float) -> EngineStatus:
    """The engine reports a phase, a new one or the present one's next bytes."""
    if progress.phase != status.phase:
        status = replace(
            status,
            state=_state_of(progress.phase),
            phases=(*status.phases, _span(status, at_s)),
            phase=progress.phase,
            phase_started_s=at_s,
        )
    return replace(
        status,
        bytes_done=progress.bytes_done or status.bytes_done,
        bytes_total=progress.bytes_total or status.bytes_total,
        detail=progress.detail,
    )


def ready(status: EngineStatus, message: Ready, at_s: float) -> EngineStatus:
    return replace(
        status,
        state=EngineState.READY,
        phases=(*status.phases, _span(status, at_s)),
        phase="",
        detail="",
        facts=message.facts,
    )


def _span(status: EngineStatus, at_s: float) -> PhaseSpan:
    return PhaseSpan(status.phase, status.phase_started_s, at_s - status.phase_started_s)


def _state_of(phase: str) -> EngineState:
    if phase in WARMING_PHASES:
        return EngineState.WARMING
    return EngineState.LOADING if phase in LOADING_PHASES else EngineState.STARTING
