"""Whatever arrives whenever, each request gets the tokens that it gets alone: a real network.

The cache is so small that sequences are preempted, and steps so small that prompts come in chunks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pilotlight.bench.make_model import write_model
from pilotlight.engine.core import EngineCore
from pilotlight.engine.messages import FinishReason, Submit
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.engine.worker import load
from pilotlight.tests.models.checkpoints import fp32_engine, greedy, prompt_of, run_until_idle
from pilotlight.tests.worker.fake_device import FakeGraphs

CONTEXT_LEN = 56
MAX_PROMPT_LEN = 24
MAX_TOKENS = 30
BLOCK_SIZE = 4
NUM_BLOCKS = 20
"""One longest sequence and a third."""
BLOCK_BYTES = {"auto": 2048, "int8": 640}
"""Of the model below: 128 elements a token and layer in 2 layers; int8 with 8 scales."""


@dataclass(frozen=True)
class Arrival:
    """One request: when it comes, what it asks, and when it is cancelled."""

    at_step: int
    family: int
    prompt_len: int
    own_len: int
    """So many last tokens of the prompt are its own; those before are its family's."""
    max_tokens: int
    n: int
    steps_until_abort: int | None

    @property
    def prompt(self) -> tuple[int, ...]:
        shared = max(0, self.prompt_len - self.own_len)
        own = prompt_of(self.prompt_len - shared, seed=100 + self.prompt_len)
        return (*prompt_of(MAX_PROMPT_LEN, seed=self.family)[:shared], *own)

    @property
    def abort_step(self) -> int | None:
        delay = self.steps_until_abort
        return None if delay is None else self.at_step + delay


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        at_step=st.integers(0, 6),
        family=st.integers(0, 1),
        prompt_len=st.integers(1, MAX_PROMPT_LEN),
        own_len=st.sampled_from((0, 1, 5)),
        max_tokens=st.integers(1, MAX_TOKENS),
        n=st.sampled_from((1, 1, 2)),
        steps_until_abort=st.one_of(st.none(), st.none(), st.integers(0, 40)),
    ),
    min_size=2,
    max_size=10,
)


@dataclass
class Trace:
    """Per sequence (request, sample): its tokens and its endings."""

    tokens: dict[tuple[int, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    endings: dict[tuple[int, int], list[FinishReason]] = field(
        default_factory=lambda: defaultdict(list)
    )


@pytest.fixture(
    scope="module",
    params=[
        ("auto", "off", "off"),
        ("auto", "off", "on"),
        ("auto", "off", "on, in graphs"),
        ("auto", "ngram", "off"),
        ("int8", "ngram", "off"),
    ],
    ids="-".join,
)
def core(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[EngineCore]:
    kv_cache_dtype, speculative, overlap = request.param
    overlap, _, in_graphs = overlap.partition(", ")
    with pytest.MonkeyPatch.context() as patch:
        if in_graphs:
            patch.setattr(load, "_graphs_for", lambda device, kernels, kv_dtype: FakeGraphs())
        yield _engine(tmp_path_factory, kv_cache_dtype, speculative, overlap)


def _engine(
    tmp_path_factory: pytest.TempPathFactory, kv_cache_dtype: str, speculative: str, overlap: str
) -> EngineCore:
    folder = write_model("tiny-mistral", tmp_path_factory.mktemp("model"))
    return fp32_engine(
        folder,
        kv_cache_bytes=NUM_BLOCKS * BLOCK_BYTES[kv_cache_dtype],
        kv_cache_dtype=kv_cache_dtype,
        block_size=BLOCK_SIZE,
        max_batched_tokens=7,
        max_model_len=CONTEXT_LEN,
        speculative=speculative,
        overlap=overlap,
    )


def test_every_request_gets_the_tokens_that_it_gets_alone(core: EngineCore) -> None:
    alone: dict[tuple[int, ...], list[int]] = {}
    reasons: Counter[FinishReason] = Counter()

    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(ARRIVALS)
    def check(arrivals: list[Arrival]) -> None:
        for arrival in arrivals:
            if arrival.prompt not in alone:
                alone[arrival.prompt] = _tokens_alone(core, arrival.prompt)
        trace = _play(core, arrivals)
        for i, arrival in enumerate(arrivals):
            for index in range(arrival.n):
                (reason,) = trace.endings[i, index]
                expected = alone[arrival.prompt][: arrival.max_tokens]
                _check_ending(arrival, reason, trace.tokens[i, index], expected)
                reasons[reason] += 1

    check()
    statistics = core.statistics()
    assert statistics.num_preemptions > 20, "the cache was never short"
    assert statistics.prefix_hit_tokens > 100, "no prefix was ever shared"
    num_drafted, num_accepted = statistics.num_drafted_tokens, statistics.num_accepted_tokens
    assert num_drafted == 0 or 50 < num_accepted < num_drafted, "drafts were all right or wrong"
    assert reasons[FinishReason.LENGTH] > 50
    assert reasons[FinishReason.ABORTED] > 5


def _check_ending(
    arrival: Arrival, reason: FinishReason, tokens: list[int], expected: list[int]
) -> None:
    if arrival.abort_step is not None and reason is FinishReason.ABORTED:
        assert tokens == expected[: len(tokens)]
        assert len(tokens) < len(expected)
    else:
        assert reason is FinishReason.LENGTH
        assert tokens == expected


def _play(core: EngineCore, arrivals: list[Arrival]) -> Trace:
    trace = Trace()
    step = 0
    last_arrival = max(arrival.at_step for arrival in arrivals)
    while step <= last_arrival or core.has_work:
        _submit_and_abort(core, arrivals, step)
        record = core.step()
        core.check_integrity()
        for output in record.outputs if record else ():
            key = (int(output.request_id), output.index)
            trace.tokens[key] += output.token_ids
            if output.finish_reason:
                trace.endings[key].append(output.finish_reason)
        step += 1
    assert core.statistics().num_used_blocks == 0
    return trace


def _submit_and_abort(core: EngineCore, arrivals: list[Arrival], step: int) -> None:
    for i, arrival in enumerate(arrivals):
        if arrival.at_step == step:
            sampling = SamplingParams(
                temperature=0.0, max_tokens=arrival.max_tokens, ignore_eos=True, n=arrival.n
            )
            core.submit(Submit(str(i), list(arrival.prompt), sampling))
        if arrival.abort_step == step:
            core.abort([str(i)])


def _tokens_alone(core: EngineCore, prompt: tuple[int, ...]) -> list[int]:
    """With a salt of its own, so that nothing of it is found in the cache, nor left there."""
    core.submit(Submit("alone", list(prompt), greedy(MAX_TOKENS), cache_salt=f"alone {prompt}"))
    return [token_id for output in run_until_idle(core) for token_id in output.token_ids]
