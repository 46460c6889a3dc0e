"""The state of the whole server, derived: what the engine is, and whether we drain.

Knows EngineStatus and the health service; knows no requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]

from ..engine.client import EngineClient
from ..engine.errors import Draining, NotReady
from ..engine.messages import ModelFacts
from ..engine.status import EngineState, EngineStatus
from ..proto import inference_pb2 as pb
from .timeline import eta_s

logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name
READINESS_SERVICES = ("", "readiness", SERVICE_NAME)
LIVENESS_SERVICE = "liveness"

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

STATES = {
    EngineState.STARTING: pb.SERVER_STATE_STARTING,
    EngineState.LOADING: pb.SERVER_STATE_LOADING,
    EngineState.WARMING: pb.SERVER_STATE_WARMING,
    EngineState.READY: pb.SERVER_STATE_READY,
    EngineState.STANDBY: pb.SERVER_STATE_STANDBY,
    EngineState.SLEEPING: pb.SERVER_STATE_SLEEPING,
    EngineState.STALLED: pb.SERVER_STATE_STALLED,
    EngineState.STOPPED: pb.SERVER_STATE_STOPPED,
    EngineState.FAILED: pb.SERVER_STATE_FAILED,
}


WAYS_OUT = {
    EngineState.STANDBY: "; no model is loaded, and Admin.LoadModel loads one",
    EngineState.SLEEPING: "; it sleeps, and Admin.Wake wakes it",
}


class Lifecycle:
    """Answers "what are you?" for every face: health, /readyz, the door, WatchStartup."""

    def __init__(
        self, engine: EngineClient, started_s: float, has_text: Callable[[], bool]
    ) -> None:
        self._engine = engine
        self._has_text = has_text
        self._started_s = started_s
        self._is_draining = False
        self._is_closed = False
        self.ready_after_s = 0.0
        """From the ask for the newest boot to READY; 0 before. The first is asked by the start."""
        self.ports_open_s = self.first_token_s = 0.0
        """Since process start, once; 0 before."""
        self._asked_s = 0.0
        self._logged = pb.SERVER_STATE_UNSPECIFIED
        self.health = health_aio.HealthServicer()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    @property
    def state(self) -> pb.ServerState:
        engine_state = self._engine.status.state
        is_over = engine_state in (EngineState.STOPPED, EngineState.FAILED)
        if self._is_draining and not is_over:
            return pb.SERVER_STATE_DRAINING
        if engine_state is EngineState.READY and not self._has_text():
            return pb.SERVER_STATE_WARMING  # the tokenizer is still being read
        return STATES[engine_state]

    @property
    def state_name(self) -> str:
        return pb.ServerState.Name(self.state).removeprefix("SERVER_STATE_")

    @property
    def is_ready(self) -> bool:
        return self.state == pb.SERVER_STATE_READY

    @property
    def is_resting(self) -> bool:
        """No model is in the engine, and one can be ordered."""
        return self.state in (pb.SERVER_STATE_STANDBY, pb.SERVER_STATE_SLEEPING)

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def check_open(self) -> ModelFacts:
        """The door: raises Draining or NotReady, else the facts of the model that is ready."""
        if self._is_closed:
            raise Draining("the server is shutting down; send the request elsewhere")
        status = self._engine.status
        is_ready = status.state is EngineState.READY and self._has_text()
        if not is_ready or status.facts is None:
            wait_s = eta_s(status, self.elapsed_s)
            detail = status.reason or status.phase
            message = f"the model is not ready: {self.state_name}"
            message += f" ({detail})" if detail else WAYS_OUT.get(status.state, "")
            raise NotReady(message, retry_after_s=1.0 if wait_s is None else max(0.1, wait_s))
        return status.facts

    def opened_ports(self) -> None:
        self.ports_open_s = self.elapsed_s

    def sent_token(self) -> None:
        self.first_token_s = self.first_token_s or self.elapsed_s

    def begin_drain(self) -> None:
        """Readiness goes off at once; the door stays open until `close`."""
        self._is_draining = True

    def close(self) -> None:
        self._is_closed = True

    # ---- health ------------------------------------------------------------------------------

    async def publish_liveness(self) -> None:
        await self.health.set(LIVENESS_SERVICE, SERVING)
        await self.publish_readiness()

    async def publish_readiness(self) -> None:
        for service in READINESS_SERVICES:
            await self.health.set(service, SERVING if self.is_ready else NOT_SERVING)

    async def follow_engine(self) -> None:
        """Keeps health in step with the engine for as long as the server lives."""
        was = None
        async for status in self._engine.status_changes():
            if status.state is not was:
                was = status.state
                await self.settle()

    async def settle(self) -> None:
        """Whatever changed: from here on health and the time to READY say so."""
        status = self._engine.status
        if status.asked_s != self._asked_s:
            self._asked_s, self.ready_after_s = status.asked_s, 0.0
        if self.is_ready and not self.ready_after_s:
            self.ready_after_s = status.boot_s
        await self.publish_readiness()
        self._log(status)

    async def text_loaded(self, at_s: float) -> None:
        """Text was read at `at_s`, time.monotonic(): where the engine was first, READY is then.

        Not the moment of this call: an order waits for the engine before it takes the text.
        """
        self._engine.note_late_text(at_s)
        await self.settle()

    def _log(self, status: EngineStatus) -> None:
        if self.state == self._logged:
            return
        self._logged = self.state
        fields: dict[str, object] = {
            "state": self.state_name,
            "elapsed_s": round(self.elapsed_s, 3),
        }
        if status.reason:
            fields["reason"] = status.reason
        if self.is_ready:
            fields["ready_s"] = round(self.ready_after_s, 3)
            fields["phases"] = {p.name: round(p.duration_s, 3) for p in status.phases}
        logger.info("server is %s", self.state_name, extra={"fields": fields})
