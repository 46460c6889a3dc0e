"""A runner without a model: it keeps what a KV cache would hold and checks it before every token.

The next token is a hash of all tokens that can be *read back through the block table*, so a block
that was shared, evicted, overwritten or left out wrongly changes the output or fails at once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pilotlight.engine.step import Row, Step, StepResult, TokenLogprobs


def next_token(token_ids: list[int], vocab_size: int) -> int:
    digest = hashlib.blake2b(repr(token_ids).encode(), digest_size=8).digest()
    return int.from_bytes(digest) % vocab_size


def tokens_alone(prompt_ids: list[int], num_tokens: int, vocab_size: int) -> list[int]:
    """What a sequence must generate whatever else runs."""
    token_ids = list(prompt_ids)
    for _ in range(num_tokens):
        token_ids.append(next_token(token_ids, vocab_size))
    return token_ids[len(prompt_ids) :]


@dataclass(frozen=True)
class Landed:
    """A step that was over when it was started."""

    result: StepResult

    def land(self) -> StepResult:
        return self.result


class KvCheckingRunner:
    """Runs Steps of a scheduler with `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int = 50) -> None:
        self._cells: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._tokens: dict[int, list[int]] = {}
        self._tables: dict[int, list[int]] = {}

    def start(self, step: Step) -> Landed:
        return Landed(self.run(step))

    def run(self, step: Step) -> StepResult:
        self._update_slots(step)
        result = StepResult([], [])
        for row in step.rows:
            self._write(row.slot, row.start, row.num_tokens)
            if row.num_sampled:
                self._sample(row, result)
        return result

    def _update_slots(self, step: Step) -> None:
        for slot in step.released:
            del self._tokens[slot], self._tables[slot]
        for admission in step.admitted:
            assert admission.slot not in self._tokens, "a taken slot was given away"
            self._tokens[admission.slot] = list(admission.token_ids)
            self._tables[admission.slot] = []
        for growth in step.grown:
            assert len(self._tables[growth.slot]) == growth.first_index
            self._tables[growth.slot] += growth.block_ids
        for draft in step.drafted:
            self._tokens[draft.slot][draft.first_position :] = draft.token_ids

    def _write(self, slot: int, start: int, num_tokens: int) -> None:
        for position in range(start, start + num_tokens):
            block_id = self._tables[slot][position // self._block_size]
            cells = self._cells[block_id]
            cells[position % self._block_size] = self._tokens[slot][position]

    def _sample(self, row: Row, result: StepResult) -> None:
        end = row.start + row.num_tokens
        first = end - row.num_sampled + 1
        sampled = [self._token_after(row.slot, n) for n in range(first, end + 1)]
        # Those behind a wrong draft are wrong too: a later step must not read them.
        self._tokens[row.slot][first:] = sampled
        result.token_ids += sampled
        result.logprobs += [TokenLogprobs(-1.0, [], [])] * len(sampled)

    def _token_after(self, slot: int, num_tokens: int) -> int:
        """The next one after the first `num_tokens`, drafts among them."""
        read = [
            self._cells[self._tables[slot][p // self._block_size]][p % self._block_size]
            for p in range(num_tokens)
        ]
        assert read == self._tokens[slot][:num_tokens], "the blocks do not hold the tokens"
        return self.next_token(read)

    def next_token(self, token_ids: list[int]) -> int:
        return next_token(token_ids, self._vocab_size)
