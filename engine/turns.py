"""Whose prompt is computed next: a shorter one may overtake a longer one, up to a point.

First come, first served lets one long prompt hold back everybody behind it. Here the prompt with
the least left goes first, and each one that it overtakes remembers how many tokens passed it by.
When these are `max_overtaking` times its own it is due, and those that are due go as they came:
nobody waits longer than for the prompts that came before, plus that. What is in the cache does not
count as a prompt's. 0: all are due at once.

Knows sequences; knows no slots, blocks and budgets. `bench pace` replays what it does to a trace.
"""

from __future__ import annotations

from collections.abc import Iterable

from .sequence import Sequence, SequenceState


class Turns:
    def __init__(self, max_overtaking: float) -> None:
        self._max_overtaking = max_overtaking
        self._num_arrived = 0

    def arrive(self, sequences: Iterable[Sequence], num_expected: int) -> None:
        """Samples of one prompt, of which so many tokens are not in the cache now."""
        for sequence in sequences:
            sequence.arrival = self._num_arrived
            sequence.num_expected = num_expected
            self._num_arrived += 1

    def is_due(self, sequence: Sequence) -> bool:
        """What was preempted had its turn already."""
        most = self._max_overtaking * sequence.num_expected
        return sequence.num_overtaken >= most or sequence.state is SequenceState.PREEMPTED

    def ordered(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        return sorted(sequences, key=self._turn)

    def _turn(self, sequence: Sequence) -> tuple[int, int, int]:
        if self.is_due(sequence):
            return 0, 0, sequence.arrival
        if sequence.leader:  # whose prompt is computed
            num_left = 1
        elif sequence.state is SequenceState.WAITING:
            num_left = sequence.num_expected
        else:
            num_left = sequence.num_uncomputed
        return 1, num_left, sequence.arrival

    @staticmethod
    def count(computed: list[tuple[Sequence, int]], others: Iterable[Sequence]) -> None:
        """These were computed, so many tokens of each: what those before them let pass, while their
        own prompts wait."""
        if not computed:
            return
        num_tokens = {sequence.arrival: num for sequence, num in computed}
        num_passed = 0
        everybody = {s.arrival: s for s in (*others, *(s for s, _ in computed))}
        for arrival in sorted(everybody, reverse=True):
            if not everybody[arrival].is_decoding:
                everybody[arrival].num_overtaken += num_passed
            num_passed += num_tokens.get(arrival, 0)
