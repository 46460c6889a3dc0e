"""Guesses from a sequence's own text, and how many of them are made."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from pilotlight.engine.drafts import (
    MATCHED_LENGTHS,
    MAX_INDEXED_AT_ONCE,
    PROBE_INTERVAL,
    Acceptance,
    Drafter,
    NgramIndex,
    num_right,
)


def propose_all(token_ids: list[int], max_num: int = 8) -> list[int]:
    return Drafter(0.0).propose(token_ids, max_num)


def test_what_followed_before_is_proposed() -> None:
    assert propose_all([1, 2, 3, 4, 5, 9, 8, 1, 2, 3, 4], 3) == [5, 9, 8]


def test_the_newest_occurrence_counts() -> None:
    assert propose_all([1, 2, 7, 1, 2, 8, 1, 2], 1) == [8]


def test_a_longer_match_is_preferred_to_a_newer_one() -> None:
    assert propose_all([1, 2, 3, 4, 5, 0, 3, 4, 6, 1, 2, 3, 4], 1) == [5]


def test_a_text_that_repeats_is_followed_into_the_guesses() -> None:
    assert propose_all([1, 2, 3, 1, 2, 3, 1], 8) == [2, 3, 1, 2, 3, 1, 2, 3]
    assert propose_all([7, 7, 7], 5) == [7] * 5


def test_nothing_is_proposed_without_a_match_or_a_wish() -> None:
    assert propose_all([1, 2, 3, 4]) == []
    assert propose_all([1]) == []
    assert propose_all([7, 7, 7], 0) == []
    assert propose_all([7, 7, 7], -1) == []


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=20))
def test_the_index_finds_the_newest_earlier_occurrence(pieces: list[list[int]]) -> None:
    """However the sequence grew, as a search through all of it would."""
    for length in MATCHED_LENGTHS:
        index, text = NgramIndex(length), []
        for piece in pieces:
            text += piece
            index.extend(text)
            ends = [i for i in range(length, len(text)) if text[i - length : i] == text[-length:]]
            assert index.find(text) == (ends[-1] if ends else None)


def test_a_long_prompt_is_indexed_over_some_calls() -> None:
    drafter, text = Drafter(0.0), [*range(3 * MAX_INDEXED_AT_ONCE), 7, 8]
    assert drafter.propose(text, 1) == [9]
    late = [*text, *range(3 * MAX_INDEXED_AT_ONCE - 9, 3 * MAX_INDEXED_AT_ONCE - 4)]
    assert [drafter.propose(late, 1) for _ in range(2)] == [[], [late[-1] + 1]]


def test_drafts_are_right_up_to_the_first_that_is_not() -> None:
    assert num_right([1, 2, 3], [1, 2, 3, 4]) == 3
    assert num_right([1, 2, 3], [1, 5, 3, 4]) == 1
    assert num_right([1], [2, 1]) == 0
    assert num_right([], [9]) == 0


# ---- how many pay ----------------------------------------------------------------------------


def after(fates: list[tuple[int, int]]) -> Acceptance:
    acceptance = Acceptance(cost=1 / 16)
    for num_drafted, right in fates:
        acceptance.learn(num_drafted, right)
    return acceptance


def test_drafts_pay_while_the_last_is_as_probable_as_it_is_costly() -> None:
    fresh = after([])
    assert fresh.rate == 0.5
    assert fresh.num_paying() == 4
    assert after([(4, 4)] * 10).num_paying() > 40
    assert after([(4, 0)] * 5).num_paying() == 1


def test_one_is_tried_now_and_then_where_none_pays() -> None:
    acceptance = after([(1, 0)] * 40)
    tries = [acceptance.num_paying() for _ in range(4 * PROBE_INTERVAL)]
    assert sum(tries) == 4
    for _ in range(8):
        acceptance.learn(1, 1)
    assert acceptance.num_paying() > 1


def test_no_history_is_too_long() -> None:
    assert after([(1, 1)] * 20_000).num_paying() > 40
    assert after([(1, 0)] * 20_000).num_paying() in (0, 1)


def test_the_rate_is_that_of_drafts_whose_predecessors_were_right() -> None:
    """Each draft right with probability 0.7, whatever the number drafted."""
    dice = random.Random(0)
    acceptance, rates = Acceptance(cost=1 / 16), []
    for _ in range(3000):
        num = dice.randint(1, 8)
        fate = [dice.random() < 0.7 for _ in range(num)]
        acceptance.learn(num, num_right([1] * num, [int(f) for f in fate]))
        rates.append(acceptance.rate)
    assert abs(sum(rates) / len(rates) - 0.7) < 0.06
