"""The draw: its distribution against transformers' warpers, and what a seed promises.

Every test draws with fixed seeds, so the bounds either hold always or never.
"""

from __future__ import annotations

import pytest
import torch
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.tests.worker.slot_bench import SlotBench, normal_logits
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

NUM_DRAWS = 2000
LARGE_VOCAB_SIZE = 2500

CUTS: dict[str, dict[str, float]] = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 4},
    "top_k of all": {"top_k": 30},
    "top_p": {"top_p": 0.7},
    "top_p of nothing": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "top_k, then top_p of what it left": {"top_k": 5, "top_p": 0.8},
    "all": {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.1},
    "min_p binds": {"temperature": 1.3, "top_k": 9, "top_p": 0.95, "min_p": 0.3},
}

WIDE_CUTS: dict[str, dict[str, float]] = {
    "a few": {"top_k": 200},
    "a tenth": {"top_k": 256},
    "one more": {"top_k": 257},
    "many more": {"top_k": 1025},
    "far beyond": {"top_p": 0.95},
    "both": {"top_k": 2000, "top_p": 0.9},
    "min_p": {"min_p": 0.1},
}


def _expected(logits: Tensor, cut: dict[str, float]) -> Tensor:
    """[V] fp64: the distribution that transformers would draw from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(cut.get("temperature", 1.0))])
    if "top_k" in cut:
        warpers.append(TopKLogitsWarper(int(cut["top_k"])))
    if "top_p" in cut:
        warpers.append(TopPLogitsWarper(cut["top_p"]))
    if "min_p" in cut:
        warpers.append(MinPLogitsWarper(cut["min_p"]))
    ids = torch.zeros(1, 1, dtype=torch.long)
    return warpers(ids, logits[None].double())[0].softmax(-1)


def _draw_by_seed(logits: Tensor, cut: dict[str, float]) -> Tensor:
    """[NUM_DRAWS] tokens, the i-th with seed i."""
    bench = SlotBench(NUM_DRAWS)
    for seed in range(NUM_DRAWS):
        bench.admit(seed, SamplingParams(seed=seed, **cut))
    return torch.tensor(bench.sample(logits.expand(NUM_DRAWS, -1)).token_ids)


def _check_distribution(token_ids: Tensor, expected: Tensor, num_bins: int) -> None:
    """Nothing impossible is drawn; Pearson's statistic over bins of about equal weight is small."""
    assert expected[token_ids].min() > 0
    bin_of = ((expected.cumsum(0) - expected / 2) * num_bins).long().clamp(0, num_bins - 1)
    weights = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bin_of, expected)
    counts = torch.bincount(bin_of[token_ids], minlength=num_bins)
    used = weights > 0
    mean = weights[used] * len(token_ids)
    statistic = ((counts[used] - mean) ** 2 / mean).sum().item()
    num_free = max(int(used.sum()) - 1, 1)
    assert statistic < num_free + 4 * (2 * num_free) ** 0.5


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_draws_are_distributed_as_with_transformers(cut: dict[str, float]) -> None:
    logits = normal_logits(1, 30)[0]
    _check_distribution(_draw_by_seed(logits, cut), _expected(logits, cut), num_bins=1000)


@pytest.mark.parametrize("cut", WIDE_CUTS.values(), ids=WIDE_CUTS)
def test_wide_cuts_are_those_of_transformers(cut: dict[str, float]) -> None:
    logits = normal_logits(1, LARGE_VOCAB_SIZE, spread=0.5)[0].sort(descending=True).values
    token_ids = _draw_by_seed(logits, cut)
    expected = _expected(logits, cut)
    _check_distribution(token_ids, expected, num_bins=40)
    num_kept = int((expected > 0).sum())
    assert token_ids.max() > 0.97 * num_kept, "the tail of what is kept is never drawn"


@pytest.mark.parametrize("vary", ["position", "sample_index"])
def test_position_and_sample_enter_the_draw(vary: str) -> None:
    """One seed, many positions or samples: as good as many seeds."""
    num_draws, sampling = 2000, SamplingParams(seed=11)
    bench = SlotBench(num_draws)
    for i in range(num_draws):
        if vary == "position":
            bench.admit(i, SamplingParams(seed=i // 40), [1], [1] * (i % 40))
        else:
            bench.admit(i, sampling, sample_index=i)
    logits = normal_logits(1, 30)[0]
    token_ids = torch.tensor(bench.sample(logits.expand(num_draws, -1)).token_ids)
    _check_distribution(token_ids, _expected(logits, {}), num_bins=1000)


def test_neighbouring_positions_are_independent() -> None:
    """Of two fair tokens, half of all neighbours differ."""
    bench = SlotBench(2000)
    for i in range(2000):
        bench.admit(i, SamplingParams(seed=i // 40), [1], [1] * (i % 40))
    token_ids = torch.tensor(bench.sample(torch.zeros(2000, 2)).token_ids).view(50, 40)
    num_changes = int((token_ids[:, 1:] != token_ids[:, :-1]).sum())
    assert abs(num_changes - 975) < 100


# ---- what a seed promises --------------------------------------------------------------------

STABLE = {
    "plain": SamplingParams(seed=2**64 - 1),
    "cut": SamplingParams(seed=5, top_p=0.9, min_p=0.01),
    "wide cut": SamplingParams(seed=6, top_p=0.98, temperature=2.0),
    "adjusted": SamplingParams(seed=7, repetition_penalty=1.2, logit_bias={4: 1.0}, top_k=50),
}


@pytest.mark.parametrize("sampling", STABLE.values(), ids=STABLE)
def test_a_seed_draws_the_same_whatever_else_is_in_the_batch(sampling: SamplingParams) -> None:
    logits = normal_logits(8, LARGE_VOCAB_SIZE, spread=0.7)
    alone = [_token_among(logits[5:6], [0], 0, sampling, length) for length in range(1, 30)]
    for slots, row in (([3, 1, 0, 2, 7, 5, 6, 4], 5), ([6, 2], 0), ([2, 6, 0], 1)):
        batch = normal_logits(len(slots), LARGE_VOCAB_SIZE, seed=9)
        batch[row] = logits[5]
        tokens = [_token_among(batch, slots, row, sampling, length) for length in range(1, 30)]
        assert tokens == alone
    assert len(set(alone)) > 5, "the draw does not move with the position"


def _token_among(
    batch: Tensor, slots: list[int], row: int, sampling: SamplingParams, length: int
) -> int:
    """What the given row draws beside rows of all kinds."""
    bench = SlotBench(8)
    others = [SamplingParams(temperature=0.0), *STABLE.values()]
    for i, slot in enumerate(slots):
        bench.admit(slot, sampling if i == row else others[i % 5], [8], [3] * length)
    return bench.sample(batch, slots).token_ids[row]


def test_the_prompt_does_not_enter_the_draw() -> None:
    """Only seed, sample and position in the output do: a longer prompt draws the same number."""
    bench = SlotBench(2)
    logits = normal_logits(1, 30)
    for seed in range(50):
        bench.admit(0, SamplingParams(seed=seed), [1], [4, 5])
        bench.admit(1, SamplingParams(seed=seed), [6, 7, 8], [9, 1])
        first, second = bench.sample(logits.expand(2, -1)).token_ids
        assert first == second
