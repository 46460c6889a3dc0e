"""The loop body with runners that work, fail once, and fail for good."""

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


def core_with(runner) -> EngineCore:
    scheduler = Scheduler(
        num_blocks=16,
        block_size=4,
        context_len=40,
        eos_token_ids=[],
        max_num_seqs=4,
        max_batched_tokens=16,
    )
    return EngineCore(scheduler, runner, clock=lambda: 7.0)


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
