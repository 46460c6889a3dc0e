"""A trace through the real scheduler in virtual time: no model, a clock that steps are added to.

Knows the scheduler, plans of requests and what steps cost; knows no device.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..engine.core import EngineCore
from ..engine.scheduler import Scheduler
from ..engine.step import Step, StepResult
from .arrivals import Planned, clamped
from .replay import replay

BLOCK_SIZE = 16
MAX_NUM_SEQS = 64
MAX_BATCHED_TOKENS = 2048
SHORT = 0.25
"""The shortest prompts, of all: their figures are told apart."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """`by_tokens`: seconds of a step of so many tokens at the start of a context; `context_s`: for
    each token before them that a row attends to."""

    by_tokens: Mapping[int, float]
    context_s: float

    def seconds(self, step: Step) -> float:
        # What lies before a chunk is read once for many of its tokens.
        context = sum(row.start for row in step.rows)
        return self._of_tokens(step.num_tokens) + context * self.context_s

    def _of_tokens(self, num_tokens: int) -> float:
        """Between what was measured on a line, beyond it in proportion."""
        sizes = sorted(self.by_tokens)
        if num_tokens >= sizes[-1]:
            return self.by_tokens[sizes[-1]] * num_tokens / sizes[-1]
        above = bisect.bisect_left(sizes, num_tokens)
        if sizes[above] == num_tokens:
            return self.by_tokens[num_tokens]
        low, high = sizes[above - 1], sizes[above]
        share = (num_tokens - low) / (high - low)
        return self.by_tokens[low] + share * (self.by_tokens[high] - self.by_tokens[low])


@dataclass(frozen=True)
class Computed:
    num_sampled: int

    def land(self) -> StepResult:
        return StepResult([0] * self.num_sampled, [None] * self.num_sampled)


class TimedDevice:
    """Runs steps by adding their cost to its clock; samples nothing but zeros."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self.now_s = 0.0

    def clock(self) -> float:
        return self.now_s

    def wait_until(self, at_s: float) -> None:
        self.now_s = at_s

    def start(self, step: Step) -> Computed:
        self.now_s += self._costs.seconds(step)
        return Computed(sum(row.num_sampled for row in step.rows))


def replayed(
    plans: Sequence[Planned],
    speed: float,
    costs: StepCosts,
    context_len: int,
    slowdown: float,
    overtaking: float,
) -> dict[str, Any]:
    """Latencies of `plans`, `speed` times as fast as they came, under these limits."""
    device = TimedDevice(costs)
    core = EngineCore(_scheduler(context_len, slowdown, overtaking), device, device.clock)
    faster = [replace(planned, at_s=planned.at_s / speed) for planned in plans]
    due = [clamped(planned, context_len) for planned in faster]
    return replay(core, due, 1, device.clock, device.wait_until, SHORT)


def _scheduler(context_len: int, slowdown: float, overtaking: float) -> Scheduler:
    return Scheduler(
        num_blocks=MAX_NUM_SEQS * -(-context_len // BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        context_len=context_len,
        eos_token_ids=[],
        max_num_seqs=MAX_NUM_SEQS,
        max_batched_tokens=MAX_BATCHED_TOKENS,
        prefix_cache=False,
        max_decode_slowdown=slowdown,
        max_overtaking=overtaking,
    )


def capacity_speed(plans: Sequence[Planned], costs: StepCosts, context_len: int) -> float:
    """At which requests come just as fast as they are done: their time in the trace over the time
    that they take when all are there at once."""
    at_once = replayed(plans, float("inf"), costs, context_len, 0.0, 0.0)
    return (plans[-1].at_s - plans[0].at_s) / float(at_once["spent_s"])
