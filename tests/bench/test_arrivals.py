"""What a load is planned to be: times, lengths, and what a context can hold of them."""

from __future__ import annotations

import random
import statistics
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilotlight.bench.arrivals import (
    Lengths,
    Planned,
    clamped,
    poisson_times,
    random_plans,
    retimed,
)

# ---- lengths ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "lengths"), [("128", Lengths(128, 128)), ("64:512", Lengths(64, 512))]
)
def test_a_length_is_a_number_or_a_range(text: str, lengths: Lengths) -> None:
    assert Lengths.parse(text) == lengths


@pytest.mark.parametrize(
    "text", ["", "x", "0", "-1", "0:4", "5:2", "5:", ":5", "1:2:3", "1.5", "64-512"]
)
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Lengths.parse(text)


def test_a_range_is_drawn_with_both_its_ends() -> None:
    source = random.Random(0)
    assert {Lengths(3, 5).draw(source) for _ in range(100)} == {3, 4, 5}


# ---- times -----------------------------------------------------------------------------------


def test_arrivals_are_poisson() -> None:
    """Exponential gaps: mean and deviation are both one over the rate."""
    times = list(islice(poisson_times(5.0, seed=0), 20_000))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert times[0] == 0.0
    assert min(gaps) >= 0.0
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.05)


def test_an_infinite_rate_has_no_gaps() -> None:
    assert list(islice(poisson_times(float("inf"), seed=0), 5)) == [0.0] * 5


def test_a_seed_plans_one_load() -> None:
    def plans(seed: int) -> list[Planned]:
        times = poisson_times(2.0, seed)
        return list(islice(random_plans(times, Lengths(1, 99), Lengths(1, 99), seed), 20))

    assert plans(7) == plans(7)
    assert plans(7) != plans(8)


def test_another_rate_sends_the_same_requests() -> None:
    """So that what a server does at two rates can be compared."""
    slow, fast = (
        list(islice(random_plans(poisson_times(rate, 3), Lengths(1, 99), Lengths(1, 99), 3), 20))
        for rate in (1.0, 4.0)
    )
    assert [(p.input_len, p.output_len) for p in slow] == [
        (p.input_len, p.output_len) for p in fast
    ]
    assert [p.at_s / 4 for p in slow] == pytest.approx([p.at_s for p in fast])


def test_lengths_are_drawn_from_their_own_ranges() -> None:
    plans = list(islice(random_plans([0.0] * 50, Lengths(10, 19), Lengths(30, 39), 0), 50))
    assert {p.input_len for p in plans} == set(range(10, 20))
    assert {p.output_len for p in plans} == set(range(30, 40))


def test_retimed_plans_keep_their_lengths_and_end_with_the_shorter() -> None:
    plans = [Planned(9.0, 1, 2), Planned(8.0, 3, 4), Planned(7.0, 5, 6)]
    assert list(retimed(plans, iter([0.0, 0.5]))) == [Planned(0.0, 1, 2), Planned(0.5, 3, 4)]


# ---- the context -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("planned", "lengths"),
    [
        ((60, 40), (60, 40)),  # fits exactly
        ((200, 10), (90, 10)),  # a long prompt is cut
        ((10, 200), (10, 90)),  # a long answer too
        ((200, 200), (50, 50)),  # both: half for each
        ((70, 40), (60, 40)),  # what is short is kept whole
        ((30, 90), (30, 70)),
        ((0, 0), (1, 1)),  # an empty prompt cannot be sent
        ((0, 200), (1, 99)),
    ],
)
def test_lengths_are_cut_to_the_context(planned: tuple[int, int], lengths: tuple[int, int]) -> None:
    result = clamped(Planned(1.5, *planned), context_len=100)
    assert result == Planned(1.5, *lengths, is_clamped=planned != lengths)


@given(st.integers(-5, 300), st.integers(-5, 300), st.integers(2, 100))
def test_whatever_is_planned_fits_afterwards(
    input_len: int, output_len: int, context_len: int
) -> None:
    result = clamped(Planned(0.0, input_len, output_len), context_len)
    assert result.input_len >= 1
    assert result.output_len >= 1
    assert result.input_len + result.output_len <= context_len
    did_fit = min(input_len, output_len) >= 1 and input_len + output_len <= context_len
    assert result.is_clamped is not did_fit
