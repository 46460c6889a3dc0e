"""Whose prompt is computed next: who overtakes whom, how far, and that nobody starves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pilotlight.tests.engine.test_scheduler import Bench

BUDGET = 8


def bench_of(max_overtaking: float, **limits: Any) -> Bench:
    room = {"num_blocks": 200, "context_len": 200, "max_num_seqs": 6, "max_batched_tokens": BUDGET}
    return Bench(max_overtaking=max_overtaking, **(room | limits))


def prompt(name: int, length: int) -> list[int]:
    """Of nobody else's beginning."""
    return [name, *(p % 7 for p in range(length - 1))]


def order_of_first_tokens(bench: Bench) -> list[str]:
    bench.run()
    return list(dict.fromkeys(output.request_id for output in bench.outputs))


@pytest.mark.parametrize(("max_overtaking", "order"), [(0.0, "long short"), (1.0, "short long")])
def test_a_short_prompt_does_not_wait_for_a_long_one(max_overtaking: float, order: str) -> None:
    bench = bench_of(max_overtaking)
    bench.add("long", prompt(1, 60))
    bench.step()
    bench.add("short", prompt(2, 6))
    assert order_of_first_tokens(bench) == order.split()


def test_equals_go_as_they_came() -> None:
    bench = bench_of(1.0)
    for i in range(4):
        bench.add(f"r{i}", prompt(i, 20))
    assert order_of_first_tokens(bench) == ["r0", "r1", "r2", "r3"]


@pytest.mark.parametrize(("max_overtaking", "num_before"), [(0.5, 2), (1.0, 4), (2.0, 8)])
def test_a_long_prompt_is_overtaken_only_so_far(max_overtaking: float, num_before: int) -> None:
    """A stream of short ones without end: each step brings one that takes the whole of it."""
    bench = bench_of(max_overtaking)
    bench.add("long", prompt(1, 4 * BUDGET))
    for i in range(40):
        bench.add(f"short {i}", prompt(2 + i, BUDGET), max_tokens=1)
        bench.step()
    names = order_of_first_tokens(bench)
    assert names.index("long") == num_before


def test_for_one_that_is_due_memory_is_kept_together() -> None:
    """It needs nearly all blocks, and a short one is always there to take what becomes free."""
    bench = bench_of(1.0, num_blocks=12, context_len=44, max_batched_tokens=12)
    for i in range(3):
        bench.add(f"first {i}", prompt(100 + i, 8), max_tokens=6)
    bench.step()
    bench.add("long", prompt(1, 36), max_tokens=1)
    for i in range(60):
        bench.add(f"short {i}", prompt(2 + i, 8), max_tokens=4)
        bench.step()
    bench.run()
    names = [output.request_id for output in bench.outputs if output.finish_reason]
    assert names.index("long") < 20


def test_what_is_in_the_cache_does_not_count() -> None:
    bench = bench_of(1.0)
    known = prompt(1, 60)
    bench.add("before", known, max_tokens=1)
    bench.run()
    bench.outputs.clear()
    bench.add("fresh", prompt(2, 30))
    bench.add("known", [*known, 5, 6])
    assert order_of_first_tokens(bench) == ["known", "fresh"]


def test_further_samples_of_a_prompt_go_on_at_once() -> None:
    bench = bench_of(1.0)
    bench.add("two", prompt(1, 24), n=2, max_tokens=2)
    while ("two", 0) not in bench.tokens:
        bench.step()
    bench.add("short", prompt(2, 4), max_tokens=2)
    bench.run()
    firsts = list(dict.fromkeys((o.request_id, o.index) for o in bench.outputs))
    assert firsts.index(("two", 1)) <= firsts.index(("short", 0))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=15),
    max_overtaking=st.sampled_from((0.0, 0.5, 1.0, 3.0)),
    max_in_flight=st.sampled_from((1, 2)),
)
def test_nobody_lets_more_pass_than_it_must(
    lengths: list[int], max_overtaking: float, max_in_flight: int
) -> None:
    bench = bench_of(max_overtaking, max_in_flight=max_in_flight, prefix_cache=False)
    seen = []
    for i, length in enumerate(lengths):
        bench.add(f"r{i}", prompt(i, length), max_tokens=2)
        seen += bench.scheduler._requests[f"r{i}"]
        bench.step()
    bench.run()
    for sequence in seen:
        # The step that makes it due may bring more than that.
        most = max_overtaking * sequence.num_prompt_tokens + BUDGET
        assert sequence.num_overtaken <= most
