"""The state of one engine process as the front sees it. Knows no sockets and no gRPC."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from .messages import EngineStatistics, ModelFacts


class EngineState(StrEnum):
    """STARTING -> LOADING -> WARMING -> READY <-> STALLED; STOPPED or FAILED at the end.

    STARTING -> STANDBY -> LOADING where a model comes later; READY -> STARTING -> STANDBY when it
    is unloaded; READY -> STARTING -> SLEEPING -> LOADING when its memory is lent out.
    """

    STARTING = "starting"
    LOADING = "loading"
    WARMING = "warming"
    STANDBY = "standby"
    SLEEPING = "sleeping"
    READY = "ready"
    STALLED = "stalled"
    STOPPED = "stopped"
    FAILED = "failed"


class PhaseSpan(msgspec.Struct, frozen=True):
    """One named stretch of a boot; seconds since the server process started."""

    name: str
    started_s: float
    duration_s: float
    lane: str = ""
    """Empty: the boot's own line, where one phase begins as another ends. Else who was beside."""

    @property
    def ended_s(self) -> float:
        return self.started_s + self.duration_s


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the front knows now. A new one is made at every change; nothing in it is mutated."""

    state: EngineState = EngineState.STARTING
    reason: str = ""
    """Why STALLED, STOPPED or FAILED; in STANDBY and SLEEPING, why the last load failed."""
    asked_s: float = 0.0
    """When this boot, load or unload was asked for; the first boot, with the process: 0."""
    phase: str = ""
    phase_started_s: float = 0.0
    detail: str = ""
    bytes_done: int = 0
    bytes_total: int = 0
    phases: tuple[PhaseSpan, ...] = ()
    """Phases that ended, in order, of the present boot: they leave no time between them."""
    beside: tuple[PhaseSpan, ...] = ()
    """What other threads and processes did meanwhile."""
    folder: str = ""
    """Of the model's files, from the moment they are all there."""
    facts: ModelFacts | None = None
    statistics: EngineStatistics = EngineStatistics()
    num_restarts: int = 0

    @property
    def boot_s(self) -> float:
        """From the ask to the end of the newest phase that ended."""
        return self.phases[-1].ended_s - self.asked_s if self.phases else 0.0

    @property
    def attributed(self) -> float:
        """The share of `boot_s` that phases of the boot's own line account for."""
        return sum(p.duration_s for p in self.phases) / self.boot_s if self.boot_s else 0.0
