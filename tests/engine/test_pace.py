"""The pace of prompts beside decodes, by a device whose times are known."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilotlight.engine.core import EngineCore
from pilotlight.engine.messages import Submit
from pilotlight.engine.pace import MIN_TOKENS, REFRESH_STEPS, Pace
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.engine.scheduler import Scheduler
from pilotlight.engine.step import Step, StepResult
from pilotlight.tests.fake_runner import KvCheckingRunner

STEP_S, TOKEN_S = 0.040, 0.001
"""What the device takes for weights, and for each token of a prompt."""


def learned(max_slowdown: float, num_decodes: int = 1) -> Pace:
    pace = Pace(max_slowdown)
    pace.learn(num_decodes, 0, STEP_S)
    pace.learn(num_decodes, 100, STEP_S + 100 * TOKEN_S)
    return pace


def test_one_prompt_slows_decodes_to_the_limit_and_no_further() -> None:
    assert learned(2.5).prompt_budget(1, 1, 2048) == pytest.approx(1.5 * STEP_S / TOKEN_S, abs=1)


def test_several_prompts_may_delay_more_but_less_than_each_its_own() -> None:
    pace = learned(2.5)
    budgets = [pace.prompt_budget(1, num_prompts, 2048) for num_prompts in (1, 4, 9)]
    assert budgets == [60, 120, 176]


@pytest.mark.parametrize("token_s", [0.0003, 0.0007, 0.001, 0.0031])
def test_budgets_are_few_different_numbers_and_hardly_smaller(token_s: float) -> None:
    """Each is a shape of a step, and shapes that come again are run from recordings."""
    budgets, exact = set(), 1.5 * STEP_S
    for i in range(100):
        pace = Pace(2.5)
        pace.learn(1, 0, STEP_S)
        noisy_s = token_s * (1 + i / 500)
        pace.learn(1, 100, STEP_S + 100 * noisy_s)
        budgets.add(budget := pace.prompt_budget(1, 1, 2048))
        assert budget >= 7 / 8 * (exact / noisy_s - 1)
    assert len(budgets) <= 4


def test_the_room_in_the_step_is_a_limit_too() -> None:
    assert learned(2.5).prompt_budget(1, 1, 13) == 13


def test_a_prompt_advances_however_slow_it_is() -> None:
    pace = Pace(1.0)
    pace.learn(1, 0, STEP_S)
    pace.learn(1, 1, 1000.0)
    assert pace.prompt_budget(1, 1, 2048) == MIN_TOKENS


@pytest.mark.parametrize(("limit", "num_decodes", "num_prompts"), [(0, 4, 1), (2, 0, 1), (2, 4, 0)])
def test_without_a_limit_decodes_or_prompts_there_is_nothing_to_share(
    limit: float, num_decodes: int, num_prompts: int
) -> None:
    assert learned(limit, 4).prompt_budget(num_decodes, num_prompts, 2048) == 2048


def test_what_decodes_take_alone_is_measured_before_it_is_shared() -> None:
    pace = learned(2.5, num_decodes=4)
    assert pace.prompt_budget(3, 1, 2048) > 0, "3 and 4 are one class"
    assert pace.prompt_budget(5, 1, 2048) == 0


def test_it_is_measured_again_after_many_steps_with_prompts() -> None:
    pace = learned(2.5)
    for _ in range(REFRESH_STEPS - 1):
        assert pace.prompt_budget(1, 1, 2048) > 0
        pace.learn(1, 60, STEP_S + 60 * TOKEN_S)
    assert pace.prompt_budget(1, 1, 2048) == 0
    pace.learn(1, 0, STEP_S)
    assert pace.prompt_budget(1, 1, 2048) > 0


def test_one_late_step_hardly_changes_what_a_step_is_taken_to_last() -> None:
    pace = learned(2.5)
    pace.learn(1, 0, 2 * STEP_S)
    assert pace.prompt_budget(1, 1, 2048) == 64
    pace.learn(1, 0, STEP_S)
    assert pace.prompt_budget(1, 1, 2048) == pytest.approx(60, abs=1)


class TimedRunner(KvCheckingRunner):
    """Steps last as long as their tokens say, on a clock of its own."""

    now_s = 0.0

    def clock(self) -> float:
        return self.now_s

    def run(self, step: Step) -> StepResult:
        self.now_s += max(STEP_S, TOKEN_S * step.num_tokens)
        return super().run(step)


class Served:
    """A core over the timed device; keeps when each sequence's tokens came."""

    def __init__(self, max_decode_slowdown: float, num_blocks: int = 400) -> None:
        runner = TimedRunner(num_blocks, 16, 50)
        scheduler = Scheduler(
            num_blocks=num_blocks, block_size=16, context_len=2048, eos_token_ids=[],
            max_num_seqs=8, max_batched_tokens=1024, prefix_cache=False,
            max_decode_slowdown=max_decode_slowdown,
        )  # fmt: skip
        self.core = EngineCore(scheduler, runner, runner.clock)
        self.runner = runner
        self.at_s: dict[str, list[float]] = {}

    def add(self, name: str, prompt_len: int, num_tokens: int) -> None:
        self.at_s[name] = []
        prompt = [i % 50 for i in range(prompt_len)]
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        self.core.submit(Submit(name, prompt, sampling))

    def step(self) -> None:
        record = self.core.step()
        assert record is not None
        for output in record.outputs:
            self.at_s[output.request_id] += [self.runner.now_s] * len(output.token_ids)

    def longest_gap_s(self, name: str) -> float:
        times = self.at_s[name]
        return max(b - a for a, b in itertools.pairwise(times))


def test_a_long_prompt_does_not_hold_up_a_stream() -> None:
    limited, unlimited = Served(2.5), Served(0.0)
    for served in (limited, unlimited):
        served.add("stream", 8, 60)
        for _ in range(4):
            served.step()
        served.add("prompt", 1500, 1)
        while served.core.has_work:
            served.step()
    assert limited.longest_gap_s("stream") <= 2.5 * STEP_S * 1.1
    assert unlimited.longest_gap_s("stream") > 10 * STEP_S


@given(
    slowdown=st.sampled_from([1.0, 1.5, 2.5, 10.0]),
    lengths=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 12)), min_size=1, max_size=8),
)
def test_every_request_ends_whatever_the_limit(
    slowdown: float, lengths: list[tuple[int, int]]
) -> None:
    served = Served(slowdown)
    for i, (prompt_len, num_tokens) in enumerate(lengths):
        served.add(str(i), prompt_len, num_tokens)
    for _ in range(3000):
        if not served.core.has_work:
            break
        served.step()
        served.core.check_integrity()
    assert [len(times) for times in served.at_s.values()] == [n for _, n in lengths]
