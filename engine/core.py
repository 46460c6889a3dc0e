"""Schedule, run, apply: the engine's loop body, without process, channel or device.

Knows the scheduler and anything that can run a Step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from .errors import EngineError, RequestError
from .messages import EngineStatistics, FinishReason, Output, StepRecord, Submit
from .scheduler import Scheduler
from .step import Step, StepResult

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3


class StepRunner(Protocol):
    def run(self, step: Step) -> StepResult: ...


class EngineCore:
    """Turns submissions into step records. Not thread-safe: one loop owns it."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._clock = clock
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
        return bool(self._refused) or self._scheduler.has_work

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
        """Computes one batch. None when there was nothing to compute and nothing to tell."""
        began_s = self._clock()
        step = self._scheduler.schedule()
        outputs, self._refused = self._refused, []
        outputs += self._scheduler.take_ended() if step is None else self._compute(step)
        if step is None and not outputs:
            return None
        ended_s = self._clock()
        statistics = self._scheduler.statistics()
        return StepRecord(
            step=statistics.num_steps,
            outputs=outputs,
            statistics=statistics,
            ended_s=ended_s,
            duration_s=ended_s - began_s,
            num_tokens=step.num_tokens if step else 0,
        )

    def _compute(self, step: Step) -> list[Output]:
        scheduled_s = self._clock()
        try:
            result = self._runner.run(step)
        except Exception as error:
            return self._survive(step, error)
        self._num_failed_in_a_row = 0
        self._scheduler.took(step, self._clock() - scheduled_s)
        return self._scheduler.apply(step, result, scheduled_s)

    def _survive(self, step: Step, error: Exception) -> list[Output]:
        """A failed step costs the sequences in it; a device that keeps failing costs the engine."""
        self._num_failed_in_a_row += 1
        if self._num_failed_in_a_row >= MAX_FAILED_STEPS:
            raise EngineError(f"{MAX_FAILED_STEPS} steps in a row failed: {error}") from error
        logger.exception("step %d failed; its %d sequences end", step.index, len(step.rows))
        return self._scheduler.fail(step, "this step could not be computed")
