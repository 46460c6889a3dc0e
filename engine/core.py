"""Schedule, start, land, apply: the engine's loop body, without process, channel or device.

Knows the scheduler and anything that can start a Step. With two steps in flight the next one is
scheduled and on its way to the device while this one is computed: a device never waits for Python.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .errors import EngineError, RequestError
from .messages import EngineStatistics, FinishReason, Output, StepRecord, Submit
from .scheduler import Scheduler
from .step import Step, StepResult

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3


class Computation(Protocol):
    def land(self) -> StepResult:
        """Waits until the step is computed."""
        ...


class StepRunner(Protocol):
    def start(self, step: Step) -> Computation:
        """Begins to compute; steps are computed in the order in which they were started."""
        ...


@dataclass(frozen=True, slots=True)
class Flight:
    step: Step
    computation: Computation
    started_s: float


class EngineCore:
    """Turns submissions into step records. Not thread-safe: one loop owns it."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        clock: Callable[[], float] = time.monotonic,
        max_in_flight: int = 1,
    ) -> None:
        """`max_in_flight`: 1: a step is over before the next is scheduled; 2: see above."""
        self._scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._max_in_flight = max_in_flight
        self._in_flight: deque[Flight] = deque()
        self._landed_s = 0.0
        self._refused: list[Output] = []
        self._num_failed_in_a_row = 0

    def submit(self, submit: Submit) -> None:
        """Queues a request. One that cannot be taken ends in the next record, never silently."""
        try:
            self._scheduler.add(submit)
        except RequestError as error:
            self._refused += [
                Output(submit.request_id, i, [], FinishReason.ERROR, error=str(error))
                for i in range(submit.sampling.n)
            ]

    def abort(self, request_ids: list[str], index: int | None = None) -> None:
        for request_id in request_ids:
            self._scheduler.abort(request_id, index)

    @property
    def has_work(self) -> bool:
        return bool(self._refused or self._in_flight) or self._scheduler.has_work

    @property
    def num_in_flight(self) -> int:
        return len(self._scheduler.live_request_ids())

    def live_request_ids(self) -> list[str]:
        return self._scheduler.live_request_ids()

    def statistics(self) -> EngineStatistics:
        return self._scheduler.statistics()

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()

    def step(self) -> StepRecord | None:
        """Starts what can be started, and brings the oldest step in flight to its end.

        None when there was nothing to compute and nothing to tell.
        """
        began_s = self._clock()
        outputs, self._refused = self._refused, []
        outputs += self._take_off()
        flight = self._in_flight.popleft() if self._in_flight else None
        outputs += self._land(flight) if flight else self._scheduler.take_ended()
        if flight is None and not outputs:
            return None
        ended_s = self._clock()
        return StepRecord(
            step=self._scheduler.accounts.num_steps,
            outputs=outputs,
            ended_s=ended_s,
            duration_s=ended_s - began_s,
            num_tokens=flight.step.num_tokens if flight else 0,
        )

    def _take_off(self) -> list[Output]:
        """Starts steps; the outputs of one that could not be started."""
        while len(self._in_flight) < self._max_in_flight:
            may_start = not self._in_flight or self._scheduler.may_run_ahead
            step = self._scheduler.schedule() if may_start else None
            if step is None:
                break
            started_s = self._clock()
            try:
                computation = self._runner.start(step)
            except Exception as error:
                return self._survive(step, error)
            self._in_flight.append(Flight(step, computation, started_s))
        return []

    def _land(self, flight: Flight) -> list[Output]:
        try:
            result = flight.computation.land()
        except Exception as error:
            return self._survive(flight.step, error)
        self._num_failed_in_a_row = 0
        # What was started behind another step began when that was over.
        began_s, self._landed_s = max(flight.started_s, self._landed_s), self._clock()
        self._scheduler.took(flight.step, self._landed_s - began_s)
        return self._scheduler.apply(flight.step, result, flight.started_s)

    def _survive(self, step: Step, error: Exception) -> list[Output]:
        """A failed step costs the sequences in it; a device that keeps failing costs the engine."""
        self._num_failed_in_a_row += 1
        if self._num_failed_in_a_row >= MAX_FAILED_STEPS:
            raise EngineError(f"{MAX_FAILED_STEPS} steps in a row failed: {error}") from error
        logger.exception("step %d failed; its %d sequences end", step.index, len(step.rows))
        return self._scheduler.fail(step, "this step could not be computed")
