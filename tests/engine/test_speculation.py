"""Drafts in the scheduler: what they cost, what they bring, where they stop.

The checking runner reads every cell before each token, so a block that holds a wrong draft fails.
With a vocabulary of one token every draft is right, with a large one hardly any.
"""

from __future__ import annotations

import pytest
from pilotlight.engine.core import EngineCore
from pilotlight.engine.messages import FinishReason, Output, Submit
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.engine.scheduler import Scheduler
from pilotlight.engine.speculation import MAX_STEP_ROWS
from pilotlight.engine.step import Step, StepResult
from pilotlight.tests.fake_runner import KvCheckingRunner, tokens_alone

CYCLE = [5, 6, 7, 8] * 3


class CyclingRunner(KvCheckingRunner):
    """After 5, 6, 7, 8 comes 5; keeps its steps. `breaks_at`: positions that get another token."""

    def __init__(self, num_blocks: int, block_size: int, breaks_at: tuple[int, ...] = ()) -> None:
        super().__init__(num_blocks, block_size)
        self.steps: list[Step] = []
        self._breaks_at = breaks_at

    def run(self, step: Step) -> StepResult:
        self.steps.append(step)
        return super().run(step)

    def next_token(self, token_ids: list[int]) -> int:
        return 40 if len(token_ids) in self._breaks_at else 5 + len(token_ids) % 4


def core_with(runner: KvCheckingRunner, **limits) -> EngineCore:
    sizes = {"num_blocks": 40, "block_size": 4, "context_len": 100, "max_num_seqs": 8}
    settings = {"max_batched_tokens": 64, "speculative": "ngram", "eos_token_ids": [], **limits}
    return EngineCore(Scheduler(**(sizes | settings)), runner)


def run(core: EngineCore) -> list[Output]:
    outputs = []
    while core.has_work:
        record = core.step()
        core.check_integrity()
        outputs += record.outputs if record else []
    return outputs


def submit(core: EngineCore, prompt: list[int], request_id: str = "a", **sampling) -> None:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 20, **sampling})
    core.submit(Submit(request_id, prompt, params))


def tokens(outputs: list[Output], request_id: str = "a") -> list[int]:
    return [t for o in outputs if o.request_id == request_id for t in o.token_ids]


def num_sampled(runner: CyclingRunner) -> list[list[int]]:
    return [[row.num_sampled for row in step.rows] for step in runner.steps]


def test_right_drafts_come_out_together() -> None:
    runner = CyclingRunner(40, 4)
    core = core_with(runner)
    submit(core, CYCLE, max_tokens=20)
    outputs = run(core)
    assert tokens(outputs) == (CYCLE * 3)[:20]
    assert [len(o.token_ids) for o in outputs] == [1, 16, 3]
    assert num_sampled(runner) == [[1], [16], [3]]
    statistics = core.statistics()
    assert (statistics.num_drafted_tokens, statistics.num_accepted_tokens) == (17, 17)


def test_a_wrong_draft_takes_those_after_it_along() -> None:
    """Position 16 gets token 40; the four tokens before it are right and kept."""
    runner = CyclingRunner(40, 4, breaks_at=(16,))
    core = core_with(runner)
    submit(core, CYCLE, max_tokens=12)
    outputs = run(core)
    assert tokens(outputs) == [5, 6, 7, 8, 40, 6, 7, 8, 5, 6, 7, 8]
    assert [len(o.token_ids) for o in outputs[:2]] == [1, 4]
    assert num_sampled(runner)[1] == [11], "ten drafts and one more are all that is wanted"
    statistics = core.statistics()
    assert statistics.num_accepted_tokens < statistics.num_drafted_tokens


@pytest.mark.parametrize("max_tokens", range(1, 22))
def test_max_tokens_is_never_passed(max_tokens: int) -> None:
    core = core_with(CyclingRunner(40, 4))
    submit(core, CYCLE, max_tokens=max_tokens)
    outputs = run(core)
    assert tokens(outputs) == (CYCLE * 3)[:max_tokens]
    assert outputs[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("context_len", [13, 14, 17, 20, 21])
def test_the_context_is_never_passed(context_len: int) -> None:
    core = core_with(CyclingRunner(40, 4), context_len=context_len)
    submit(core, CYCLE, max_tokens=100)
    assert tokens(run(core)) == (CYCLE * 3)[: context_len - 12]


@pytest.mark.parametrize("min_tokens", [0, 2, 3, 7])
def test_a_stop_token_ends_inside_the_right_drafts(min_tokens: int) -> None:
    """Token 7 is the third, seventh, ... of the output."""
    runner = CyclingRunner(40, 4)
    core = core_with(runner)
    submit(core, CYCLE, stop_token_ids=(7,), min_tokens=min_tokens)
    *_, last = outputs = run(core)
    expected = next(n for n in (3, 7, 11) if n > min_tokens)
    assert tokens(outputs) == (CYCLE * 2)[:expected]
    assert last.finish_reason is FinishReason.STOP
    assert (last.stop_token_id, last.token_ids[-1]) == (7, 7)
    assert len(last.logprobs) == len(last.top_logprobs) == len(last.token_ids)


def test_only_right_tokens_are_found_in_the_prefix_cache() -> None:
    runner = CyclingRunner(40, 4, breaks_at=(16,))
    core = core_with(runner)
    submit(core, CYCLE, max_tokens=9)
    text = CYCLE + tokens(run(core))
    submit(core, text, "same")
    submit(core, [*CYCLE, 5, 6, 7, 8, 5, 6, 7, 8], "as drafted")
    cached = {o.request_id: o.num_cached_tokens for o in run(core) if o.num_cached_tokens}
    assert cached == {"same": 20, "as drafted": 16}


def test_rows_are_shared_out_evenly_and_end_at_the_limit() -> None:
    runner = CyclingRunner(100, 4)
    core = core_with(runner, num_blocks=100, max_num_seqs=20)
    for i in range(3):
        submit(core, CYCLE, f"r{i}", max_tokens=30)
    core.step()
    core.step()
    assert num_sampled(runner)[1] == [6, 5, 5]
    for i in range(3, 20):
        submit(core, CYCLE, f"r{i}", max_tokens=30)
    while core.has_work:
        core.step()
    for step in runner.steps:
        num_drafts = sum(len(draft.token_ids) for draft in step.drafted)
        num_decodes = sum(row.num_sampled > 0 for row in step.rows)
        assert num_drafts == 0 or num_drafts + num_decodes <= MAX_STEP_ROWS + len(step.admitted)


def test_what_one_sequence_leaves_goes_to_the_next() -> None:
    runner = CyclingRunner(40, 4)
    core = core_with(runner)
    submit(core, CYCLE, "short", max_tokens=3)
    submit(core, CYCLE, "long", max_tokens=30)
    core.step()
    core.step()
    assert num_sampled(runner)[1] == [2, 14]


def test_drafts_stay_inside_the_step_budget() -> None:
    runner = CyclingRunner(40, 4)
    core = core_with(runner, max_batched_tokens=6, max_num_seqs=4)
    submit(core, CYCLE)
    submit(core, CYCLE, "b")
    run(core)
    assert max(step.num_tokens for step in runner.steps) == 6


def test_drafts_preempt_nobody_and_wait_for_room() -> None:
    """Two sequences fill the pool but for one block each: no draft may take it."""
    runner = CyclingRunner(10, 4)
    core = core_with(runner, num_blocks=10, context_len=40, max_num_seqs=2)
    submit(core, CYCLE, "a", max_tokens=9)
    submit(core, CYCLE, "b", max_tokens=9)
    outputs = run(core)
    assert core.statistics().num_preemptions == 0
    assert tokens(outputs, "a") == tokens(outputs, "b") == (CYCLE * 2)[:9]
    assert core.statistics().num_used_blocks == 0


def test_a_preempted_sequence_drafts_again() -> None:
    runner = CyclingRunner(12, 4)
    core = core_with(runner, num_blocks=12, context_len=48, max_num_seqs=3)
    for request_id in "abc":
        submit(core, CYCLE, request_id, max_tokens=34)
    outputs = run(core)
    assert core.statistics().num_preemptions > 0
    for request_id in "abc":
        assert tokens(outputs, request_id) == (CYCLE * 3)[:34]


def test_a_cancel_in_mid_draft_publishes_no_draft() -> None:
    runner = CyclingRunner(40, 4, breaks_at=(14,))
    scheduler = Scheduler(
        num_blocks=40, block_size=4, context_len=100, eos_token_ids=[], max_num_seqs=2,
        max_batched_tokens=32, speculative="ngram",
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=20)
    scheduler.add(Submit("a", CYCLE, sampling))
    for is_last in (False, True):
        step = scheduler.schedule()
        result = runner.run(step)
        if is_last:
            assert step.drafted, "nothing was in mid-draft"
            scheduler.abort("a")
        scheduler.apply(step, result, 1.0)
        scheduler.check_integrity()
    assert scheduler.statistics().num_used_blocks == 0
    scheduler.add(Submit("as drafted", CYCLE * 2, sampling))
    runner.run(scheduler.schedule())
    assert scheduler.statistics().prefix_hit_tokens == 12


def test_logits_that_are_not_finite_end_the_sequence_where_it_would_read_them() -> None:
    runner = CyclingRunner(40, 4)
    core = core_with(runner)
    submit(core, CYCLE)
    core.step()
    step = core._scheduler.schedule()
    result = runner.run(step)
    result.token_ids[2] = -1
    (output,) = core._scheduler.apply(step, result, 1.0)
    assert output.token_ids == [6, 7]
    assert output.finish_reason is FinishReason.ERROR
    assert not core.has_work


def test_a_step_that_fails_in_mid_draft_costs_its_sequence_only() -> None:
    runner = CyclingRunner(40, 4)
    core = core_with(runner)
    submit(core, CYCLE)
    core.step()
    step = core._scheduler.schedule()
    assert step.drafted
    (output,) = core._scheduler.fail(step, "broke")
    assert output.finish_reason is FinishReason.ERROR
    core.check_integrity()
    submit(core, CYCLE, "next")
    assert tokens(run(core), "next") == (CYCLE * 2)[:20]


def test_off_means_one_token_a_step() -> None:
    runner = CyclingRunner(40, 4)
    core = core_with(runner, speculative="off")
    submit(core, CYCLE)
    assert all(len(output.token_ids) == 1 for output in run(core))
    assert core.statistics().num_drafted_tokens == 0


def test_auto_gives_up_on_a_text_that_does_not_repeat() -> None:
    """Two tokens in a hashed order: something is always found, and right half of the time."""
    counts = {}
    for mode in ("ngram", "auto"):
        core = core_with(
            KvCheckingRunner(700, 4, 2), num_blocks=700, context_len=2000, speculative=mode
        )
        submit(core, [0, 1, 1, 0], max_tokens=1500)
        assert tokens(run(core)) == tokens_alone([0, 1, 1, 0], 1500, 2)
        counts[mode] = core.statistics()
    auto, always = counts["auto"], counts["ngram"]
    assert auto.num_drafted_tokens < 0.5 * always.num_drafted_tokens
    assert auto.num_accepted_tokens > 0.75 * always.num_accepted_tokens
