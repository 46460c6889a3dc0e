"""Drafts change when tokens come, never which: the real engine with and without them, bit for bit.

Every draft is a decode of its own to the kernels, so even the log probabilities are equal.
"""

from __future__ import annotations

import gc
from collections import defaultdict

import msgspec
import pytest
from pilotlight.engine.core import EngineCore
from pilotlight.engine.messages import EngineStatistics, Submit
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.server.config import DEMO_MODEL
from pilotlight.server.text.tokenizer import load_tokenizer
from pilotlight.tests.models.checkpoints import cpu_engine, run_until_idle

CODE = """\
def area_of_square(side):
    return side * side

def area_of_circle(radius):
    return 3.14 * radius * radius

def area_of_rectangle(width, height):
    return width * height

def area_of_"""
LIST = "one, two, three, four, one, two, three, four, one, two, three, four, one, two,"
PROSE = "A pilot light is a small flame that"
PROMPTS = (CODE, LIST, PROSE)

SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "seeded": SamplingParams(temperature=0.7, seed=7),
    "cut": SamplingParams(temperature=0.9, top_k=40, top_p=0.9, min_p=0.02, seed=3),
    "logprobs": SamplingParams(temperature=0.0, num_logprobs=3),
    "penalties": SamplingParams(
        temperature=0.3, repetition_penalty=1.05, presence_penalty=0.1, frequency_penalty=0.1
    ),
    "min_tokens": SamplingParams(temperature=0.0, min_tokens=40, logit_bias={5: 1.5}),
    "samples": SamplingParams(temperature=0.6, seed=1, n=3, num_logprobs=0),
}
NUM_TOKENS = 48


def booted(speculative: str, dtype: str) -> EngineCore:
    return cpu_engine(
        DEMO_MODEL,
        speculative=speculative,
        dtype=dtype,
        max_batched_tokens=64,
        max_num_seqs=12,
        max_model_len=300,
    )


def answers(core: EngineCore, sampling: SamplingParams) -> dict:
    """Of all prompts at once: tokens, reasons and log probabilities of each sequence."""
    encoder = load_tokenizer(DEMO_MODEL)
    asked = msgspec.structs.replace(sampling, max_tokens=NUM_TOKENS)
    for i, prompt in enumerate(PROMPTS):
        ids = encoder.encode(prompt, add_special_tokens=True)
        core.submit(Submit(f"{i}", ids, asked, cache_salt=f"{sampling}"))
    found: dict = defaultdict(lambda: ([], [], []))
    for output in run_until_idle(core):
        tokens, logprobs, reasons = found[output.request_id, output.index]
        tokens += output.token_ids
        logprobs += zip(output.logprobs or [], output.top_logprobs or [], strict=True)
        reasons += [output.finish_reason] if output.finish_reason else []
    core.check_integrity()
    return dict(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drafts_change_no_token_and_no_bit(dtype: str) -> None:
    expected, statistics = {}, {}
    for mode in ("off", "ngram", "auto"):
        core = booted(mode, dtype)
        for name, sampling in SAMPLINGS.items():
            found = answers(core, sampling)
            assert found == expected.setdefault(name, found), f"{name} with {mode}"
            assert all(len(reasons) == 1 for _, _, reasons in found.values())
        statistics[mode] = core.statistics()
        del core
        gc.collect()
    _check_that_it_paid(statistics)


def _check_that_it_paid(statistics: dict[str, EngineStatistics]) -> None:
    assert statistics["off"].num_drafted_tokens == 0
    for mode in ("ngram", "auto"):
        assert statistics[mode].num_accepted_tokens > 150
        assert statistics[mode].num_drafted_tokens > statistics[mode].num_accepted_tokens
        assert statistics[mode].num_steps < statistics["off"].num_steps
