"""Steps that start before the one before them has landed: tokens that only the device knows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pilotlight.engine.core import EngineCore
from pilotlight.engine.messages import Output, Submit
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.engine.worker import load
from pilotlight.engine.worker.staging import OneMemory
from pilotlight.server.config import DEMO_MODEL
from pilotlight.tests.models.checkpoints import (
    cpu_engine,
    engine_tokens,
    prompt_of,
    run_until_idle,
)
from pilotlight.tests.worker.fake_device import FakeGraphs
from torch import Tensor

NUM_TOKENS = 12
PROMPTS = [prompt_of(length, seed=length) for length in (1, 5, 20)]
Answers = dict[tuple[str, int], list[Output]]
"""By request and sample."""
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "drawn": SamplingParams(seed=5, temperature=1.3),
    "cut": SamplingParams(seed=6, top_p=0.9, num_logprobs=3),
    "penalties": SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.5),
    "late stop": SamplingParams(temperature=0.0, min_tokens=4, num_logprobs=0),
}


class Overwritten(OneMemory):
    """As if nothing were copied: what is fetched is what the device holds when it is looked at."""

    def fetch(self, computed: Tensor) -> Callable[[], Tensor]:
        return lambda: computed


class Unseen(OneMemory):
    """As if nobody waited for the copy."""

    def fetch(self, computed: Tensor) -> Callable[[], Tensor]:
        not_yet = torch.zeros_like(computed)
        return lambda: not_yet


def engine(
    overlap: str, staging: OneMemory, monkeypatch: pytest.MonkeyPatch, has_graphs: bool = True
) -> EngineCore:
    graphs = FakeGraphs() if has_graphs else None
    monkeypatch.setattr(load, "_graphs_for", lambda device, kernels, kv_dtype: graphs)
    monkeypatch.setattr(load, "staging_for", lambda device: staging)
    return cpu_engine(
        DEMO_MODEL, dtype="float32", speculative="off", max_model_len=100, overlap=overlap
    )


def answers(core: EngineCore) -> Answers:
    """Of all samplings at once, some of which arrive while others decode."""
    outputs: list[Output] = []
    for i, (name, sampling) in enumerate(SAMPLINGS.items()):
        prompt = prompt_of(4 + 9 * i, seed=i)
        asked = {"max_tokens": NUM_TOKENS, "n": 1 + i % 2}
        core.submit(Submit(name, prompt, SamplingParams(**(_fields(sampling) | asked))))
        record = core.step()
        outputs += record.outputs if record else []
    outputs += run_until_idle(core)
    core.check_integrity()
    by_sequence: Answers = {}
    for output in outputs:
        by_sequence.setdefault((output.request_id, output.index), []).append(output)
    return by_sequence


def _fields(sampling: SamplingParams) -> dict:
    return {name: getattr(sampling, name) for name in sampling.__struct_fields__}


def tokens(answers: Answers) -> dict[tuple[str, int], list[int]]:
    return {
        key: [t for output in outputs for t in output.token_ids] for key, outputs in answers.items()
    }


def logprobs(answers: Answers) -> list[float]:
    """All there are: which prompts share a step changes their last bits."""
    outputs = [output for key in sorted(answers) for output in answers[key]]
    top = [
        p.logprob for output in outputs for entries in output.top_logprobs or () for p in entries
    ]
    return top + [p for output in outputs for p in output.logprobs or ()]


@pytest.mark.parametrize("has_graphs", [True, False], ids=["graphs", "recordings"])
def test_every_sampling_gives_what_it_gives_step_by_step(
    has_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = answers(engine("on", OneMemory(), monkeypatch, has_graphs))
    expected = answers(engine("off", OneMemory(), monkeypatch, has_graphs))
    assert tokens(ahead) == tokens(expected)
    assert logprobs(ahead) == pytest.approx(logprobs(expected), abs=1e-5)
    assert len(logprobs(ahead)) == (1 + 3 + 1) * NUM_TOKENS


@pytest.mark.parametrize("staging", [Overwritten(), Unseen()], ids=["overwritten", "late"])
def test_the_device_notices_tokens_that_are_overwritten_or_late(
    staging: OneMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy alone: then the tokens lie in the memory that all graphs share."""
    expected = engine_tokens(engine("off", OneMemory(), monkeypatch), PROMPTS, NUM_TOKENS)
    assert engine_tokens(engine("on", OneMemory(), monkeypatch), PROMPTS, NUM_TOKENS) == expected
    assert engine_tokens(engine("on", staging, monkeypatch), PROMPTS, NUM_TOKENS) != expected
