"""Turns what an engine says while it boots into an EngineStatus. Knows no process and no clock."""

from __future__ import annotations

from msgspec.structs import replace

from .messages import Located, Progress, Ready, Standby
from .status import EngineState, EngineStatus, PhaseSpan

FRONT_PHASE = "start_process"
"""From process start to the engine's: the interpreter, and no more than spawning needs."""
LAUNCH_PHASE = "start_engine"
"""From its start to the engine's first word: the interpreter and the plain modules."""

ACCEPT_PHASE = "accept"
"""From the ask for a model to the first word of the engine that stood by."""
UNLOAD_PHASE = "unload"
TEXT_PHASE = "read_text"
"""Behind the engine's last phase: what the front still needed for the tokenizer."""

LOADING_PHASES = frozenset(
    {
        "fetch",
        "load_weights",
        "bind_kernels",
        "measure_memory",
        "allocate_kv",
        "capture_graphs",
        "await_weights",
    }
)
WARMING_PHASES = frozenset({"warm"})


def launched(status: EngineStatus, at_s: float) -> EngineStatus:
    """An engine process was started, the first or another; `at_s` since the server started."""
    is_first = status.num_restarts == 0
    return EngineStatus(
        state=EngineState.STARTING,
        phase=LAUNCH_PHASE,
        phase_started_s=at_s,
        phases=(PhaseSpan(FRONT_PHASE, 0.0, at_s),) if is_first else (),
        beside=status.beside if is_first else (),
        asked_s=0.0 if is_first else at_s,
        num_restarts=status.num_restarts,
    )


def beside(status: EngineStatus, span: PhaseSpan) -> EngineStatus:
    """Another thread or process ended a stretch of work for this boot."""
    return replace(status, beside=(*status.beside, span))


def located(status: EngineStatus, message: Located) -> EngineStatus:
    """The model's files are there."""
    return replace(status, folder=message.folder)


def asked_to_load(status: EngineStatus, at_s: float) -> EngineStatus:
    """An engine that stood by is to load a model: a boot of its own, with its own phases."""
    return _asked(status, EngineState.LOADING, ACCEPT_PHASE, at_s)


def asked_to_unload(status: EngineStatus, at_s: float) -> EngineStatus:
    """Not ready from this moment; the memory is back when the engine stands by."""
    return _asked(status, EngineState.STARTING, UNLOAD_PHASE, at_s)


def _asked(status: EngineStatus, state: EngineState, phase: str, at_s: float) -> EngineStatus:
    return EngineStatus(
        state=state,
        phase=phase,
        phase_started_s=at_s,
        asked_s=at_s,
        num_restarts=status.num_restarts,
    )


def stood_by(
    status: EngineStatus, message: Standby, resting: EngineState, at_s: float
) -> EngineStatus:
    """The engine is there without a model; `resting` is STANDBY or SLEEPING."""
    return EngineStatus(
        state=resting,
        reason=message.reason,
        phases=(*status.phases, _span(status, at_s)) if status.phase else status.phases,
        beside=status.beside,
        asked_s=status.asked_s,
        num_restarts=status.num_restarts,
    )


def advanced(status: EngineStatus, progress: Progress, at_s: float) -> EngineStatus:
    """The engine reports a phase, a new one or the present one's next bytes."""
    if progress.phase != status.phase:
        status = replace(
            status,
            state=_state_in(progress.phase, status.state),
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


def read_text(status: EngineStatus, at_s: float) -> EngineStatus:
    """The front's half of a model is there: it was awaited where the engine's was first."""
    engine_ready_s = status.phases[-1].ended_s if status.phases else at_s
    if status.state is not EngineState.READY or at_s <= engine_ready_s:
        return status
    span = PhaseSpan(TEXT_PHASE, engine_ready_s, at_s - engine_ready_s)
    return replace(status, phases=(*status.phases, span))


def _span(status: EngineStatus, at_s: float) -> PhaseSpan:
    return PhaseSpan(status.phase, status.phase_started_s, at_s - status.phase_started_s)


def _state_in(phase: str, before: EngineState) -> EngineState:
    """A load from standby is LOADING from its first moment."""
    if phase in WARMING_PHASES:
        return EngineState.WARMING
    is_loading = phase in LOADING_PHASES or before is EngineState.LOADING
    return EngineState.LOADING if is_loading else EngineState.STARTING
