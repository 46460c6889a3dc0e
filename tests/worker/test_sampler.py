"""What the sampler does with logits: greedy, adjusted, logprobs, rows that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.tests.worker.slot_bench import SlotBench, normal_logits
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

VOCAB_SIZE = 20
GREEDY = SamplingParams(temperature=0.0)


def test_greedy_takes_the_best_token_of_each_row() -> None:
    bench = SlotBench(4)
    for slot in range(4):
        bench.admit(slot, SamplingParams(temperature=0.0, top_k=3, top_p=0.5, seed=slot))
    logits = normal_logits(4, VOCAB_SIZE)
    assert bench.sample(logits).token_ids == logits.argmax(-1).tolist()
    assert bench.sample(logits).logprobs == [None] * 4


def test_rows_find_their_slots() -> None:
    """Only slot 2 bans the best token; it is the first row."""
    bench = SlotBench(3)
    bench.admit(0, GREEDY)
    bench.admit(2, SamplingParams(temperature=0.0, logit_bias={5: -100.0}))
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, 5], logits[:, 6] = 2.0, 1.0
    assert bench.sample(logits, slots=[2, 0]).token_ids == [6, 5]


# ---- logits that a request changes -----------------------------------------------------------


def _adjusted(sampling: SamplingParams, prompt: list[int], output: list[int]) -> Tensor:
    bench = SlotBench(1)
    bench.admit(0, sampling, prompt, output)
    return bench.adjusted(normal_logits(1, VOCAB_SIZE))


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    """Over prompt and output; a token that comes twice is punished once."""
    prompt, output = [1, 2, 2, 7], [9, 9, 1]
    logits = normal_logits(1, VOCAB_SIZE)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([prompt + output]), logits.clone())
    assert {bool(logits[0, i] > 0) for i in (1, 2, 7, 9)} == {True, False}
    sampling = SamplingParams(temperature=0.0, repetition_penalty=penalty)
    torch.testing.assert_close(_adjusted(sampling, prompt, output), expected)


@pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0.0), (0.0, 0.25), (-0.5, 0.75)])
def test_presence_and_frequency_count_the_output_only(presence: float, frequency: float) -> None:
    prompt, output = [1, 2, 7], [9, 9, 1, 9, 4]
    expected = normal_logits(1, VOCAB_SIZE)
    for token_id in set(output):
        expected[0, token_id] -= presence + frequency * output.count(token_id)
    sampling = SamplingParams(
        temperature=0.0, presence_penalty=presence, frequency_penalty=frequency
    )
    torch.testing.assert_close(_adjusted(sampling, prompt, output), expected)


def test_bias_comes_before_all_penalties() -> None:
    """The bias turns the sign of token 3, which decides how repetition punishes it."""
    expected = normal_logits(1, VOCAB_SIZE)
    biased = expected[0, 3].item() + 50.0
    expected[0, 3] = biased / 2.0 - (0.5 + 0.25)
    expected[0, 8] -= 4.0
    sampling = SamplingParams(
        temperature=0.0,
        logit_bias={3: 50.0, 8: -4.0},
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
    )
    torch.testing.assert_close(_adjusted(sampling, [], [3]), expected)


def test_only_the_rows_that_ask_are_changed() -> None:
    bench = SlotBench(2)
    bench.admit(0, GREEDY, [1, 2])
    bench.admit(1, SamplingParams(temperature=0.0, repetition_penalty=2.0), [1, 2])
    logits = normal_logits(2, VOCAB_SIZE)
    changed = bench.adjusted(logits) != logits
    assert changed[0].tolist() == [False] * VOCAB_SIZE
    assert changed[1].nonzero().flatten().tolist() == [1, 2]


@pytest.mark.parametrize(("num_output", "is_masked"), [(0, True), (2, True), (3, False)])
def test_stop_tokens_are_masked_until_min_tokens(num_output: int, is_masked: bool) -> None:
    bench = SlotBench(1)
    sampling = SamplingParams(temperature=0.0, min_tokens=3)
    bench.admit(0, sampling, [1, 2, 3, 4], [7] * num_output, stop_ids=(0, 5))
    expected = normal_logits(1, VOCAB_SIZE)
    if is_masked:
        expected[0, [0, 5]] = torch.finfo(torch.float32).min
    assert bench.adjusted(normal_logits(1, VOCAB_SIZE)).equal(expected)


def test_min_tokens_without_stop_tokens_changes_nothing() -> None:
    assert _adjusted(SamplingParams(min_tokens=3), [1], []).equal(normal_logits(1, VOCAB_SIZE))


def test_a_slot_forgets_who_had_it_before() -> None:
    bench = SlotBench(1)
    loud = SamplingParams(
        logit_bias={4: 9.0}, repetition_penalty=2.0, min_tokens=9, num_logprobs=2, top_k=1
    )
    bench.admit(0, loud, [1, 2, 3], [4, 4, 4], stop_ids=(6,))
    bench.admit(0, GREEDY, [1])
    logits = normal_logits(1, VOCAB_SIZE)
    assert bench.adjusted(logits).equal(logits)
    assert bench.sample(logits).logprobs == [None]


# ---- log probabilities -----------------------------------------------------------------------


def test_logprobs_are_those_of_the_raw_logits() -> None:
    bench = SlotBench(4)
    for slot, num_logprobs in enumerate((2, -1, 0, 5)):
        sampling = SamplingParams(
            temperature=0.5, top_k=4, num_logprobs=num_logprobs, logit_bias={3: 2.0}, seed=slot
        )
        bench.admit(slot, sampling)
    logits = normal_logits(4, VOCAB_SIZE)
    result = bench.sample(logits)
    normal = logits.log_softmax(-1)
    assert result.logprobs[1] is None
    for row, k in ((0, 2), (2, 0), (3, 5)):
        logprobs = result.logprobs[row]
        values, ids = normal[row].sort(descending=True)
        assert logprobs is not None
        assert logprobs.chosen == pytest.approx(normal[row, result.token_ids[row]].item())
        assert logprobs.top_ids == ids[:k].tolist()
        assert logprobs.top == pytest.approx(values[:k].tolist())


@pytest.mark.parametrize("others", [0, 3, 20])
def test_of_equally_likely_tokens_the_first_are_named(others: int) -> None:
    """Whatever the rows beside it ask for."""
    bench = SlotBench(2)
    for slot, num_logprobs in enumerate((3, others)):
        bench.admit(slot, SamplingParams(temperature=0.0, num_logprobs=num_logprobs))
    row = torch.tensor([-1.0, -0.5, -1.0, -0.5, -1.0, -0.5, -0.5, -3.0] * 8)
    first = bench.sample(row.expand(2, -1)).logprobs[0]
    assert first is not None
    assert first.top_ids == [1, 3, 5]


def test_more_logprobs_than_tokens_are_all_of_them() -> None:
    bench = SlotBench(1)
    bench.admit(0, SamplingParams(num_logprobs=20))
    (logprobs,) = bench.sample(normal_logits(1, 7)).logprobs
    assert logprobs is not None
    assert sorted(logprobs.top_ids) == list(range(7))
    assert sum(map(math.exp, logprobs.top)) == pytest.approx(1.0)


# ---- rows that are not finite ----------------------------------------------------------------

SAMPLINGS = {
    "greedy": GREEDY,
    "free": SamplingParams(seed=3),
    "cut": SamplingParams(seed=3, top_k=5, top_p=0.9),
    "adjusted": SamplingParams(seed=3, repetition_penalty=1.5, num_logprobs=2),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_bad", [1, VOCAB_SIZE])
def test_a_row_that_is_not_finite_costs_only_itself(
    sampling: SamplingParams, bad: float, num_bad: int
) -> None:
    bench = SlotBench(6)
    for slot in range(6):
        bench.admit(slot, sampling if slot == 2 else list(SAMPLINGS.values())[slot % 4])
    logits = normal_logits(6, VOCAB_SIZE)
    expected = bench.sample(logits)
    logits[2, :num_bad] = bad
    result = bench.sample(logits)
    assert result.token_ids[2] == -1
    del result.token_ids[2], expected.token_ids[2], result.logprobs[2], expected.logprobs[2]
    assert result == expected
    assert min(expected.token_ids) >= 0


# ---- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "num_threads"), [(1, 1), (40, 2)])
def test_few_rows_are_one_threads_work(
    num_rows: int, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's other threads would wait for more on the cores of the next step's kernels."""
    bench = SlotBench(num_rows)
    for slot in range(num_rows):
        bench.admit(slot, SamplingParams(seed=slot, num_logprobs=2))
    seen: list[int] = []
    topk = Tensor.topk

    def noted(logits: Tensor, k: int, **options: bool) -> tuple[Tensor, Tensor]:
        seen.append(torch.get_num_threads())
        return topk(logits, k, **options)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(Tensor, "topk", noted)
        bench.sample(normal_logits(num_rows, 32_000))
        assert seen == [num_threads]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
