"""Which sequences of a decode step get how many drafts, and what became of them.

Knows sequences and the rows of a step; knows no blocks and no device. `drafts` has the guesses.
"""

from __future__ import annotations

from .drafts import Drafter, num_right
from .sequence import Sampled, Sequence

MODES = ("auto", "ngram", "off")
"""ngram: whatever is found is drafted; auto: only what is likely to pay."""

MAX_STEP_ROWS = 16
"""Decode steps are filled with drafts up to so many rows: beyond, arithmetic costs more than
reading the weights, and a draft as much as a sequence."""

ROW_COST = 1 / MAX_STEP_ROWS
"""Of a step with one row: what a draft costs, and how probable it must be to pay."""


class Speculation:
    """Drafts for sequences of at most `context_len` tokens, in steps of at most `max_rows` rows."""

    def __init__(self, mode: str, context_len: int, max_rows: int) -> None:
        self._mode = mode
        self._context_len = context_len
        self._max_rows = min(max_rows, MAX_STEP_ROWS)
        self.num_drafted_tokens = 0
        self.num_accepted_tokens = 0

    @property
    def is_on(self) -> bool:
        return self._mode != "off"

    def has_room(self, num_rows: int) -> bool:
        """Whether a step of so many decodes can take drafts."""
        return self.is_on and 0 < num_rows < self._max_rows

    def propose(self, sequences: list[Sequence]) -> None:
        """Drafts for the sequences of one step, all decoding: to each an even part of the rows
        that are left, and what others left of theirs."""
        num_left = self._max_rows - len(sequences)
        for i, sequence in enumerate(sequences):
            if num_left > 0:
                share = -(-num_left // (len(sequences) - i))
                sequence.draft_ids = self._drafts(sequence, share)
                num_left -= len(sequence.draft_ids)

    def _drafts(self, sequence: Sequence, max_num: int) -> list[int]:
        # After the drafts one more token is sampled, which must still be wanted.
        num_wanted = min(max_num, sequence.num_tokens_left(self._context_len) - 1)
        if sequence.drafter is None:
            sequence.drafter = Drafter(ROW_COST if self._mode == "auto" else 0.0)
        return sequence.drafter.propose(sequence.token_ids, num_wanted)

    def judge(
        self, sequence: Sequence, draft_ids: list[int], sampled: list[Sampled]
    ) -> list[Sampled]:
        """What was sampled after tokens that are right: the right drafts, and one token more."""
        num = num_right(draft_ids, [token_id for token_id, _ in sampled])
        self.num_drafted_tokens += len(draft_ids)
        self.num_accepted_tokens += num
        if sequence.drafter is not None:
            sequence.drafter.learn(len(draft_ids), num)
        return sampled[: num + 1]
