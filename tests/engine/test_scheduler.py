"""The scheduler with a runner that checks every block it reads: properties first, then cases."""

from __future__ import annotations

from collections import defaultdict, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pilotlight.engine.errors import ConfigError, DuplicateRequest, InvalidField
from pilotlight.engine.messages import FinishReason, Output, Submit
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.engine.scheduler import Scheduler
from pilotlight.engine.sequence import Sequence
from pilotlight.engine.speculation import MODES
from pilotlight.engine.step import Step, StepResult
from pilotlight.tests.fake_runner import KvCheckingRunner, tokens_alone

VOCAB_SIZE = 50


class Bench:
    """A scheduler and a checking runner, stepped by hand; collects what each sequence got."""

    def __init__(
        self,
        *,
        num_blocks=16,
        block_size=4,
        context_len=40,
        eos=(),
        vocab_size=VOCAB_SIZE,
        max_in_flight=1,
        **limits,
    ) -> None:
        limits = {"max_num_seqs": 4, "max_batched_tokens": 16, **limits}
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            context_len=context_len,
            eos_token_ids=list(eos),
            **limits,
        )
        self.runner = KvCheckingRunner(num_blocks, block_size, vocab_size)
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.endings: dict[tuple[str, int], list[FinishReason]] = defaultdict(list)
        self.outputs: list[Output] = []
        self.max_in_flight = max_in_flight
        self.in_flight: deque[tuple[Step, StepResult]] = deque()
        self.num_ahead = 0

    def add(self, request_id: str, prompt: list[int], **sampling) -> None:
        sampling = {"temperature": 0.0, "max_tokens": 6, **sampling}
        self.scheduler.add(Submit(request_id, prompt, SamplingParams(**sampling)))

    def collect(self, outputs: list[Output]) -> None:
        self.outputs += outputs
        for output in outputs:
            key = (output.request_id, output.index)
            self.tokens[key] += output.token_ids
            if output.finish_reason:
                self.endings[key].append(output.finish_reason)

    def step(self, abort_in_flight: tuple[str, ...] = ()) -> Step | None:
        self.take_off()
        if not self.in_flight:
            self.collect(self.scheduler.take_ended())
            return None
        for request_id in abort_in_flight:
            self.scheduler.abort(request_id)
        step, result = self.in_flight.popleft()
        self.collect(self.scheduler.apply(step, result, 1.0))
        self.scheduler.check_integrity()
        return step

    def take_off(self) -> None:
        while len(self.in_flight) < self.max_in_flight:
            if self.in_flight and not self.scheduler.may_run_ahead:
                return
            step = self.scheduler.schedule()
            if step is None:
                return
            self.num_ahead += bool(self.in_flight)
            self.in_flight.append((step, self.runner.run(step)))

    def run(self, max_steps: int = 2000) -> int:
        for num_steps in range(max_steps):
            if not self.scheduler.has_work and not self.in_flight:
                return num_steps
            self.step()
        raise AssertionError(f"work left after {max_steps} steps: a request starves")


STOP_ID, MIN_TOKENS = 1, 3

requests = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt length
        st.integers(0, 3),  # prompt family: equal beginnings
        st.integers(1, 12),  # max_tokens
        st.integers(1, 3),  # n
        st.integers(0, 12),  # steps before it arrives
        st.one_of(st.none(), st.integers(0, 20)),  # abort after so many steps, in flight if odd
        st.booleans(),  # ends at STOP_ID, but not before MIN_TOKENS
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(
    requests=requests,
    num_blocks=st.integers(10, 30),
    max_num_seqs=st.integers(1, 6),
    extra_budget=st.integers(0, 20),
    prefix_cache=st.booleans(),
    speculative=st.sampled_from(MODES),
    vocab_size=st.sampled_from((1, 2, 4, VOCAB_SIZE)),  # how often a draft is right
    max_in_flight=st.sampled_from((1, 2)),
    deterministic=st.booleans(),
    max_overtaking=st.sampled_from((0.0, 1.0, 50.0)),
)
def test_every_request_ends_once_with_the_tokens_it_gets_alone(
    requests,
    num_blocks,
    max_num_seqs,
    extra_budget,
    prefix_cache,
    speculative,
    vocab_size,
    max_in_flight,
    deterministic,
    max_overtaking,
) -> None:
    bench = Bench(
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_batched_tokens=max_num_seqs + extra_budget + 4 * deterministic,
        deterministic=deterministic,
        prefix_cache=prefix_cache,
        speculative=speculative,
        vocab_size=vocab_size,
        max_in_flight=max_in_flight,
        max_overtaking=max_overtaking,
    )
    arrivals, aborts = defaultdict(list), defaultdict(list)
    asked = {}
    for i, (length, family, max_tokens, n, arrives, aborted, stops) in enumerate(requests):
        prompt = [(family * 7 + p) % vocab_size for p in range(length)]
        asked[f"r{i}"] = (prompt, max_tokens, n, stops)
        arrivals[arrives].append(f"r{i}")
        if aborted is not None:
            aborts[arrives + aborted].append(f"r{i}")
    for now in range(40):
        for request_id in arrivals[now]:
            prompt, max_tokens, n, stops = asked[request_id]
            stop = {"stop_token_ids": (STOP_ID,), "min_tokens": MIN_TOKENS} if stops else {}
            bench.add(request_id, prompt, max_tokens=max_tokens, n=n, **stop)
        if now % 2 == 0:
            for request_id in aborts[now]:
                bench.scheduler.abort(request_id)
        bench.step(abort_in_flight=tuple(aborts[now]) if now % 2 else ())
    bench.run()

    for request_id, (prompt, max_tokens, n, stops) in asked.items():
        room = min(max_tokens, 40 - len(prompt))
        alone = tokens_alone(prompt, room, vocab_size)
        if stops and STOP_ID in alone[MIN_TOKENS:]:
            alone = alone[: alone.index(STOP_ID, MIN_TOKENS) + 1]
        for index in range(n):
            key = (request_id, index)
            assert len(bench.endings[key]) == 1, f"{key} ended {bench.endings[key]}"
            got, (ending,) = bench.tokens[key], bench.endings[key]
            assert got == alone[: len(got)]
            assert ending is FinishReason.ABORTED or got == alone
            assert ending is not FinishReason.STOP or (stops and got[-1] == STOP_ID)
    statistics = bench.scheduler.statistics()
    assert statistics.num_used_blocks == statistics.num_running == statistics.num_waiting == 0


def test_a_step_is_scheduled_before_the_tokens_it_computes_are_known() -> None:
    bench = Bench(max_in_flight=2)
    bench.add("a", [1] * 20, max_tokens=3)
    step = bench.step()
    assert [(r.start, r.num_tokens, r.num_sampled) for r in step.rows] == [(0, 16, 0)]
    (ahead, _) = bench.in_flight[0]
    assert [(r.start, r.num_tokens, r.num_sampled) for r in ahead.rows] == [(16, 4, 1)]
    bench.step()
    (ahead, _) = bench.in_flight[0]
    assert [(r.start, r.num_tokens, r.num_sampled) for r in ahead.rows] == [(20, 1, 1)]
    bench.run()
    assert bench.tokens["a", 0] == tokens_alone([1] * 20, 3, VOCAB_SIZE)


def test_the_length_of_a_sequence_is_known_ahead() -> None:
    """No row is computed behind the last token that is wanted."""
    bench = Bench(max_in_flight=2)
    bench.add("a", [1] * 4, max_tokens=5)
    assert bench.run() == 5
    assert bench.scheduler.statistics().num_computed_tokens == 4 + 4


def test_what_is_computed_behind_a_stop_token_is_dropped() -> None:
    alone = tokens_alone([1, 2, 3], 10, VOCAB_SIZE)
    bench = Bench(eos=[alone[4]], max_in_flight=2)
    bench.add("stops", [1, 2, 3], max_tokens=10)
    bench.run()
    assert bench.tokens["stops", 0] == alone[: alone.index(alone[4]) + 1]
    statistics = bench.scheduler.statistics()
    assert statistics.num_computed_tokens == 3 + len(bench.tokens["stops", 0])
    assert statistics.num_used_blocks == 0


def test_nothing_is_preempted_while_a_step_is_in_flight() -> None:
    bench = Bench(num_blocks=10, context_len=40, max_num_seqs=2, max_in_flight=2)
    bench.add("old", [1] * 14, max_tokens=24)
    bench.add("young", [2] * 14, max_tokens=24)
    bench.run()
    assert bench.scheduler.statistics().num_preemptions > 0
    assert bench.num_ahead > 10
    for request_id, first in (("old", 1), ("young", 2)):
        assert bench.tokens[request_id, 0] == tokens_alone([first] * 14, 24, VOCAB_SIZE)


def test_a_token_that_was_dropped_names_no_block() -> None:
    """Aborted in flight, twice: its last rows computed tokens that it never had."""
    bench = Bench(max_in_flight=2)
    bench.add("a", [1] * 6, max_tokens=20)
    bench.step()
    bench.step(abort_in_flight=("a",))
    bench.run()
    bench.add("b", [1] * 6 + tokens_alone([1] * 6, 6, VOCAB_SIZE), max_tokens=4)
    bench.run()
    assert bench.tokens["b", 0] == tokens_alone([1] * 6, 10, VOCAB_SIZE)[6:]


def test_decodes_go_first_and_prompts_fill_the_budget() -> None:
    bench = Bench(max_batched_tokens=10)
    bench.add("a", [1] * 4, max_tokens=20)
    bench.step()
    bench.add("b", [2] * 30)
    step = bench.step()
    assert [(r.num_tokens, r.num_sampled) for r in step.rows] == [(1, 1), (9, 0)]
    step = bench.step()
    assert [(r.num_tokens, r.start) for r in step.rows] == [(1, 5), (9, 9)]


def test_a_wholly_cached_prompt_still_computes_its_last_token() -> None:
    bench = Bench()
    for request_id in ("a", "b"):
        bench.add(request_id, list(range(8)))
        bench.run()
    step_rows = next(o for o in bench.outputs if o.request_id == "b")
    assert step_rows.num_cached_tokens == 4, "the block of the last token is computed again"
    assert bench.tokens["a", 0] == bench.tokens["b", 0]


def test_samples_of_one_request_share_the_prompts_blocks() -> None:
    bench = Bench(max_batched_tokens=32, prefix_cache=False)
    bench.add("a", list(range(17)), n=4, max_tokens=3)
    bench.step()
    assert bench.scheduler.statistics().num_running == 1, "siblings wait for the leader's prompt"
    bench.step()
    statistics = bench.scheduler.statistics()
    assert statistics.num_running == 4
    assert statistics.num_used_blocks == 4 + 4 * 1
    bench.run()


def test_without_a_prefix_cache_requests_share_nothing() -> None:
    bench = Bench(prefix_cache=False)
    for request_id in ("a", "b"):
        bench.add(request_id, list(range(12)))
        bench.run()
    assert bench.scheduler.statistics().prefix_hit_tokens == 0


def test_salts_separate_prefixes() -> None:
    bench = Bench()
    for request_id, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        params = SamplingParams(temperature=0.0, max_tokens=2)
        bench.scheduler.add(Submit(request_id, list(range(12)), params, salt))
        bench.run()
    cached = {o.request_id: o.num_cached_tokens for o in bench.outputs if o.num_cached_tokens}
    assert cached == {"c": 8}


def test_the_youngest_is_preempted_and_loses_nothing() -> None:
    bench = Bench(num_blocks=10, context_len=40, max_num_seqs=2)
    bench.add("old", [1] * 14, max_tokens=24)
    bench.add("young", [2] * 14, max_tokens=24)
    bench.run()
    assert bench.scheduler.statistics().num_preemptions > 0
    for request_id, first in (("old", 1), ("young", 2)):
        assert bench.tokens[request_id, 0] == tokens_alone([first] * 14, 24, VOCAB_SIZE)
    ended = [o.request_id for o in bench.outputs if o.finish_reason]
    assert ended == ["old", "young"]


@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding", "preempted", "in flight"])
def test_abort_frees_blocks_within_two_steps_in_every_state(state: str) -> None:
    bench = Bench(num_blocks=10, max_num_seqs=2, max_batched_tokens=8)
    bench.add("other", [9] * 14, max_tokens=24)
    if state == "waiting":
        bench.add("third", [8] * 14, max_tokens=24)
    bench.add("it", [1] * 14, max_tokens=24)
    reached = {
        "waiting": lambda: True,
        "prefilling": lambda: _sequence(bench, "it").num_computed in range(1, 14),
        "decoding": lambda: _sequence(bench, "it").num_output_tokens > 1,
        "preempted": lambda: _sequence(bench, "it").state.value == "preempted",
        "in flight": lambda: _sequence(bench, "it").num_output_tokens > 1,
    }[state]
    for _ in range(60):
        if reached():
            break
        bench.step()
    assert reached(), "the state was never reached"
    if state == "in flight":
        bench.step(abort_in_flight=("it",))
    else:
        assert bench.scheduler.abort("it")
    for _ in range(2):
        bench.step()
    assert bench.endings["it", 0] == [FinishReason.ABORTED]
    assert "it" not in bench.scheduler.live_request_ids()
    bench.scheduler.abort("other")
    bench.scheduler.abort("third")
    bench.run()
    assert bench.scheduler.statistics().num_used_blocks == 0


def _sequence(bench: Bench, request_id: str) -> Sequence:
    return bench.scheduler._requests[request_id][0]


def test_abort_is_idempotent() -> None:
    bench = Bench()
    bench.add("a", [1])
    assert bench.scheduler.abort("a")
    assert not bench.scheduler.abort("a")
    bench.run()
    assert bench.endings["a", 0] == [FinishReason.ABORTED]


def test_stop_tokens_and_min_tokens() -> None:
    alone = tokens_alone([1, 2, 3], 10, VOCAB_SIZE)
    eos = alone[4]
    first = alone.index(eos)
    bench = Bench(eos=[eos])
    bench.add("stops", [1, 2, 3], max_tokens=10)
    bench.add("ignores", [1, 2, 3], max_tokens=10, ignore_eos=True)
    bench.add("later", [1, 2, 3], max_tokens=10, min_tokens=first + 1)
    bench.run()
    assert bench.tokens["stops", 0] == alone[: first + 1]
    assert bench.endings["stops", 0] == [FinishReason.STOP]
    assert bench.tokens["ignores", 0] == alone
    assert len(bench.tokens["later", 0]) > first + 1


def test_the_context_ends_a_sequence() -> None:
    bench = Bench(context_len=20)
    bench.add("a", [1] * 15, max_tokens=100, ignore_eos=True)
    bench.run()
    assert len(bench.tokens["a", 0]) == 5
    assert bench.endings["a", 0] == [FinishReason.LENGTH]


def test_a_row_that_is_not_finite_fails_alone() -> None:
    bench = Bench()
    bench.add("good", [1, 2], max_tokens=3)
    bench.add("bad", [3, 4], max_tokens=3)
    step = bench.scheduler.schedule()
    result = bench.runner.run(step)
    bad = StepResult([result.token_ids[0], -1], result.logprobs)
    bench.collect(bench.scheduler.apply(step, bad, 1.0))
    bench.run()
    assert bench.endings["bad", 0] == [FinishReason.ERROR]
    assert bench.tokens["good", 0] == tokens_alone([1, 2], 3, VOCAB_SIZE)


def test_bad_submissions_are_refused_and_the_next_is_served() -> None:
    bench = Bench()
    bench.add("a", [1])
    with pytest.raises(DuplicateRequest):
        bench.add("a", [1])
    with pytest.raises(InvalidField, match="1 to 39"):
        bench.add("b", [1] * 40)
    with pytest.raises(InvalidField):
        bench.add("c", [])
    bench.add("d", [1] * 39)
    bench.run()
    assert set(bench.endings) == {("a", 0), ("d", 0)}


@pytest.mark.parametrize(
    ("limits", "says"),
    [({"max_batched_tokens": 3}, "max_num_seqs"), ({"num_blocks": 9}, "kv_cache_bytes")],
)
def test_limits_that_cannot_work_are_refused(limits: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Bench(**limits)
