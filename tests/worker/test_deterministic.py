"""With --deterministic a request's tokens are the same alone and among others, to the last bit.

bfloat16, whose rounding turns other orders of additions into other tokens, and log probabilities,
which show what tokens may hide. On a CPU it is rows of prompts and decodes whose bits differ: where
keys come from, the cache's blocks of an earlier answer, is what an engine without it is told by.
"""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from pilotlight.engine.core import EngineCore
from pilotlight.engine.messages import Output, Submit
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.server.config import DEMO_MODEL
from pilotlight.tests.models.checkpoints import cpu_engine, prompt_of, run_until_idle

KINDS = (
    SamplingParams(temperature=0.0, num_logprobs=2, max_tokens=24, ignore_eos=True),
    SamplingParams(seed=3, top_p=0.95, num_logprobs=2, max_tokens=24, ignore_eos=True),
    SamplingParams(seed=4, num_logprobs=0, max_tokens=24, ignore_eos=True),
)


def engine(deterministic: bool, **settings: int | str) -> EngineCore:
    sizes: dict[str, int | str] = {
        "max_num_seqs": 8,
        "max_batched_tokens": 40,
        "kv_cache_bytes": 64 << 20,
    }
    return cpu_engine(
        DEMO_MODEL, dtype="bfloat16", max_model_len=160, num_threads=2,
        deterministic=deterministic, **(sizes | settings),
    )  # fmt: skip


@pytest.fixture(scope="module")
def core() -> EngineCore:
    return engine(deterministic=True)


def told(outputs: list[Output], name: str) -> list[tuple]:
    """Token by token: how many come at once is not what was asked."""
    return [
        token
        for output in outputs
        if output.request_id == name
        for token in zip(
            output.token_ids, output.logprobs or (), output.top_logprobs or (), strict=True
        )
    ]


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_alone_and_among_others_to_the_last_bit(core: EngineCore, kind: int) -> None:
    it = Submit("it", prompt_of(75, seed=kind), KINDS[kind])
    core.submit(it)
    alone = told(run_until_idle(core), "it")
    assert len(alone) == 24
    outputs: list[Output] = []
    for i in range(20):
        sampling = SamplingParams(seed=i, max_tokens=5 + 3 * i, ignore_eos=True)
        prompt = it.prompt_ids[: 9 * i] if i % 3 else prompt_of(6 * i + 1, seed=i)
        core.submit(Submit(f"other {i}", prompt or [1], sampling))
        if i == 7:
            core.submit(it)
        record = core.step()
        outputs += record.outputs if record else []
    outputs += run_until_idle(core)
    assert told(outputs, "it") == alone


def answer(
    core: EngineCore, prompt: list[int], salt: str = "", sampling: SamplingParams = KINDS[0]
) -> list[tuple]:
    core.submit(Submit("it", prompt, sampling, cache_salt=salt))
    return told(run_until_idle(core), "it")


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_prompt_that_was_an_answer_once(deterministic: bool) -> None:
    """Its blocks hold keys of decodes: shared, its log probabilities are other ones, of some.

    Plain ones: over integers decodes of so few tokens are computed as prompts are.
    """
    core = engine(deterministic, kv_cache_dtype="plain")
    prompts = [prompt_of(41, seed=seed) for seed in range(9, 15)]
    longer = [prompt + [token_id for token_id, _, _ in answer(core, prompt)] for prompt in prompts]
    among_others = [answer(core, prompt) for prompt in longer]
    alone = [answer(core, prompt, salt="alone") for prompt in longer]
    assert (among_others == alone) is deterministic


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_cache_that_is_too_small_for_all(deterministic: bool) -> None:
    """What would be preempted, and its tokens computed again as a prompt, waits instead."""
    block_bytes = 2 * 6 * 4 * 32 * 2 * 16
    core = engine(deterministic, kv_cache_bytes=11 * block_bytes, max_num_seqs=4)
    prompts = [prompt_of(30 + i, seed=i) for i in range(4)]
    longer = replace(KINDS[0], max_tokens=60)
    alone = [answer(core, prompt, "alone", longer) for prompt in prompts]
    for i, prompt in enumerate(prompts):
        core.submit(Submit(f"r{i}", prompt, longer))
    outputs = run_until_idle(core)
    assert (core.statistics().num_preemptions > 0) is not deterministic
    if deterministic:
        assert [told(outputs, f"r{i}") for i in range(4)] == alone
