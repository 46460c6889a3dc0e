"""The loop body with runners that work, fail once, and fail for good."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from pilotlight.engine.core import EngineCore
from pilotlight.engine.errors import EngineError
from pilotlight.engine.messages import FinishReason, Submit
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.engine.scheduler import Scheduler
from pilotlight.engine.step import Step, StepResult
from pilotlight.tests.fake_runner import KvCheckingRunner, tokens_alone


class FailingRunner(KvCheckingRunner):
    """Raises at the given step numbers, after it took the step's changes."""

    def __init__(self, failing_steps: set[int]) -> None:
        super().__init__(16, 4)
        self._failing_steps = failing_steps

    def run(self, step: Step) -> StepResult:
        result = super().run(step)
        if step.index in self._failing_steps:
            raise RuntimeError("device fell over")
        return result


class LateRunner(KvCheckingRunner):
    """Keeps what happens in order; the steps of `failing` come down with an error."""

    def __init__(self, failing: set[int] = frozenset()) -> None:
        super().__init__(16, 4)
        self.failing = failing
        self.events: list[str] = []

    def start(self, step: Step) -> Landing:
        self.events.append(f"start {step.index}")
        return Landing(self, step.index, self.run(step))


@dataclass
class Landing:
    runner: LateRunner
    index: int
    result: StepResult

    def land(self) -> StepResult:
        self.runner.events.append(f"land {self.index}")
        if self.index in self.runner.failing:
            raise RuntimeError("device fell over")
        return self.result


def core_with(runner, max_in_flight: int = 1) -> EngineCore:
    scheduler = Scheduler(
        num_blocks=16,
        block_size=4,
        context_len=40,
        eos_token_ids=[],
        max_num_seqs=4,
        max_batched_tokens=16,
    )
    return EngineCore(scheduler, runner, clock=lambda: 7.0, max_in_flight=max_in_flight)


def submit(request_id: str, prompt: list[int], max_tokens: int = 4) -> Submit:
    return Submit(request_id, prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens))


def run(core: EngineCore) -> list:
    outputs = []
    for _ in range(100):
        record = core.step()
        if record is None:
            return outputs
        outputs += record.outputs
        core.check_integrity()
    raise AssertionError("the core does not come to rest")


def test_tokens_and_timings_come_out() -> None:
    core = core_with(KvCheckingRunner(16, 4))
    core.submit(submit("a", [1, 2]))
    outputs = run(core)
    assert [t for o in outputs for t in o.token_ids] == tokens_alone([1, 2], 4, 50)
    assert outputs[0].first_scheduled_s == 7.0
    assert not core.has_work
    assert core.step() is None


def test_a_refused_submission_ends_with_a_reason() -> None:
    core = core_with(KvCheckingRunner(16, 4))
    core.submit(submit("long", [1] * 100))
    (output,) = run(core)
    assert output.finish_reason is FinishReason.ERROR
    assert "1 to 39" in output.error


def test_abort_is_told_even_when_nothing_is_computed() -> None:
    core = core_with(KvCheckingRunner(16, 4))
    core.submit(submit("a", [1]))
    core.abort(["a", "unknown"])
    (output,) = run(core)
    assert output.finish_reason is FinishReason.ABORTED


def test_a_failed_step_costs_its_sequences_only() -> None:
    core = core_with(FailingRunner({1}))
    core.submit(submit("a", [1, 2]))
    core.step()
    outputs = run_after_failure(core)
    assert outputs[0].finish_reason is FinishReason.ERROR
    core.submit(submit("b", [3, 4]))
    assert [t for o in run(core) for t in o.token_ids] == tokens_alone([3, 4], 4, 50)


def run_after_failure(core: EngineCore) -> list:
    record = core.step()
    core.check_integrity()
    assert record is not None
    return record.outputs


def test_a_device_that_keeps_failing_ends_the_engine() -> None:
    core = core_with(FailingRunner({0, 1, 2}))
    for i in range(2):
        core.submit(submit(f"r{i}", [i]))
        core.step()
    core.submit(submit("last", [9]))
    with pytest.raises(EngineError, match="3 steps in a row"):
        core.step()


# ---- two steps in flight -------------------------------------------------------------------------


def test_the_next_step_is_under_way_before_one_is_waited_for() -> None:
    runner = LateRunner()
    core = core_with(runner, max_in_flight=2)
    core.submit(submit("a", [1, 2], max_tokens=3))
    outputs = run(core)
    assert [t for o in outputs for t in o.token_ids] == tokens_alone([1, 2], 3, 50)
    assert runner.events == ["start 0", "start 1", "land 0", "start 2", "land 1", "land 2"]


def test_one_step_at_a_time_is_over_before_the_next() -> None:
    runner = LateRunner()
    core = core_with(runner)
    core.submit(submit("a", [1, 2], max_tokens=2))
    run(core)
    assert runner.events == ["start 0", "land 0", "start 1", "land 1"]


def test_steps_behind_one_that_failed_bring_nothing() -> None:
    runner = LateRunner(failing={1})
    core = core_with(runner, max_in_flight=2)
    core.submit(submit("a", [1, 2], max_tokens=8))
    outputs = run(core)
    assert [o.finish_reason for o in outputs] == [FinishReason.NONE, FinishReason.ERROR]
    assert "land 2" in runner.events, "what was in flight must land before its blocks are free"
    assert core.statistics().num_used_blocks == 0
    core.submit(submit("b", [3, 4]))
    assert [t for o in run(core) for t in o.token_ids] == tokens_alone([3, 4], 4, 50)


def test_a_step_that_cannot_start_leaves_the_one_in_flight() -> None:
    core = core_with(FailingRunner({1}), max_in_flight=2)
    core.submit(submit("a", [1, 2]))
    outputs = run(core)
    assert [o.finish_reason for o in outputs] == [FinishReason.ERROR]
    assert core.statistics().num_used_blocks == 0
    assert not core.has_work
