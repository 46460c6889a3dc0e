"""Guesses at a sequence's next tokens, from its own text. Knows token ids; knows no scheduler.

Prompt lookup (Saxena 2023; vLLM's and llama.cpp's n-gram speculation): where the newest tokens
stood before, what followed them then is a good guess at what follows now. A guess that is checked
in the same step costs one more row of it, and a row is cheap while weights are read from memory.

Whether a guess was right is decided by the token that is sampled there anyway, from the same
logits and with the same random number: guesses change when tokens come, never which.
"""

from __future__ import annotations

import math

MATCHED_LENGTHS = (4, 2)
"""So many newest tokens are looked up, the longer first: a longer match is a better guess."""

MAX_INDEXED_AT_ONCE = 4096
"""Tokens per step and sequence: ten milliseconds at most, whatever the prompt."""

MEMORY = 0.9
"""Weight of the past against one draft's fate when the rate of acceptance is estimated."""

PROBE_INTERVAL = 16
"""Proposals that are passed over, where drafts do not pay, before one token is tried again."""


class NgramIndex:
    """Where the n-grams of a growing sequence were last followed by something."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._next_position: dict[int, int] = {}
        """Hash of an n-gram -> the position after its newest occurrence. A collision is a bad
        guess, no more."""
        self._num_indexed = length

    def extend(self, token_ids: list[int]) -> None:
        """Takes what the sequence gained, of a long prompt a part at each call. The last n-gram has
        no next token and waits."""
        n, start = self._length, self._num_indexed
        end = min(len(token_ids), start + MAX_INDEXED_AT_ONCE)
        if start < end:
            columns = [token_ids[start - n + i : end - n + i] for i in range(n)]
            hashes = map(hash, zip(*columns, strict=True))
            self._next_position.update(zip(hashes, range(start, end), strict=True))
            self._num_indexed = end

    def find(self, token_ids: list[int]) -> int | None:
        """Where the text goes on that once followed the newest tokens."""
        return self._next_position.get(hash(tuple(token_ids[-self._length :])))


class Acceptance:
    """How often one sequence's drafts were right, and how many pay that cost `cost` steps each."""

    def __init__(self, cost: float) -> None:
        self._cost = cost
        self._num_right = 1.0
        self._num_wrong = 1.0
        self._num_passed_over = 0

    @property
    def rate(self) -> float:
        """Probability that a draft is right when those before it were; never quite 0 or 1."""
        return min(max(self._num_right / (self._num_right + self._num_wrong), 0.01), 0.99)

    def num_paying(self) -> int:
        """Most drafts whose last is still as probable as it is costly: rate ** n >= cost.

        Where not even the first is, one is tried now and then: texts change.
        """
        num = int(math.log(self._cost) / math.log(self.rate))
        if num > 0:
            return num
        self._num_passed_over = (self._num_passed_over + 1) % PROBE_INTERVAL
        return int(self._num_passed_over == 0)

    def learn(self, num_drafted: int, num_right: int) -> None:
        """What came after the first wrong draft says nothing."""
        for is_right in [True] * num_right + [False] * (num_right < num_drafted):
            self._num_right = MEMORY * self._num_right + is_right
            self._num_wrong = MEMORY * self._num_wrong + (not is_right)


class Drafter:
    """Drafts for one sequence: those that pay if each costs `cost` of a step, all if 0."""

    def __init__(self, cost: float) -> None:
        self._indices = [NgramIndex(length) for length in MATCHED_LENGTHS]
        self._acceptance = Acceptance(cost) if cost > 0 else None

    def propose(self, token_ids: list[int], max_num: int) -> list[int]:
        """At most `max_num` guesses at what follows `token_ids`, all of the sequence so far."""
        position = self._continuation(token_ids)
        if position is None:
            return []
        num = min(max_num, self._acceptance.num_paying()) if self._acceptance else max_num
        followed = token_ids[position : position + num]
        # A text that repeats itself is followed past its end, into the guesses.
        return (followed * -(-num // len(followed)))[:num] if num > 0 else []

    def _continuation(self, token_ids: list[int]) -> int | None:
        found = None
        for index in self._indices:
            index.extend(token_ids)
            found = index.find(token_ids) if found is None else found
        return found

    def learn(self, num_drafted: int, num_right: int) -> None:
        if self._acceptance:
            self._acceptance.learn(num_drafted, num_right)


def num_right(draft_ids: list[int], token_ids: list[int]) -> int:
    """Drafts in a row that are what was sampled at their positions."""
    for i, (draft, token) in enumerate(zip(draft_ids, token_ids, strict=False)):
        if draft != token:
            return i
    return len(draft_ids)
