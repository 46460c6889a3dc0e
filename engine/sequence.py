"""One sequence of tokens on its way: what was asked, what is known, what is computed.

Knows no pool, no batch and no device.

    token_ids   [ prompt ............ | generated ......... ]
    computed    [ KV is in the blocks ......... ]
    flying                                | being computed now  |
    published   [ full blocks others may find ]
    block_ids   [ room for token_ids, at least up to computed, and for drafts ]
"""

from __future__ import annotations

from enum import Enum

from .block_pool import BlockHash, chain_hash, root_hash
from .drafts import Drafter
from .messages import FinishReason, Output, Submit
from .step import Admission, Draft, Row, TokenLogprobs

Sampled = tuple[int, TokenLogprobs | None]
"""A token, or -1 where logits were not finite, and its log probabilities."""


class SequenceState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    """Waiting again: its blocks were taken, its tokens are kept."""
    ENDED = "ended"


class Sequence:
    """Sample `index` of a request. Samples after the first wait for the `leader`'s prompt."""

    __slots__ = (
        "_hashes", "arrival", "block_ids", "cache_salt", "draft_ids", "drafter",
        "first_scheduled_s", "index", "leader", "num_awaited", "num_cached_tokens", "num_computed",
        "num_expected", "num_flights", "num_flying", "num_overtaken", "num_prompt_tokens",
        "num_published", "request_id", "sampling", "slot", "state", "stop_ids", "token_ids",
    )  # fmt: skip

    def __init__(
        self, submit: Submit, index: int, stop_ids: frozenset[int], leader: Sequence | None
    ) -> None:
        self.request_id = submit.request_id
        self.index = index
        self.sampling = submit.sampling
        self.stop_ids = stop_ids
        self.cache_salt = submit.cache_salt
        self.leader = leader
        self.token_ids = list(submit.prompt_ids)
        self.num_prompt_tokens = len(submit.prompt_ids)
        self.state = SequenceState.WAITING
        self.arrival = 0
        """How many came before."""
        self.num_expected = self.num_prompt_tokens
        """Of the prompt, those that will have to be computed, as far as was known at arrival."""
        self.num_overtaken = 0
        """Tokens of prompts that came later and were computed before this one's."""
        self.slot = -1
        self.num_flights = 0
        """Steps in flight that compute some of it."""
        self.num_flying = 0
        """Tokens that they compute."""
        self.num_awaited = 0
        """Tokens that they will bring: the device knows them first."""
        self.block_ids: list[int] = []
        self.drafter: Drafter | None = None
        self.draft_ids: list[int] = []
        """Guesses at the tokens after token_ids, in the step in flight."""
        self.num_computed = 0
        self.num_published = 0
        self.num_cached_tokens = -1
        self.first_scheduled_s = 0.0
        self._hashes: list[BlockHash] = leader._hashes.copy() if leader else []

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_in_flight(self) -> bool:
        return self.num_flights > 0

    @property
    def num_uncomputed(self) -> int:
        """Tokens, known or awaited, that no step has computed or computes now."""
        return len(self.token_ids) + self.num_awaited - self.num_computed - self.num_flying

    @property
    def is_decoding(self) -> bool:
        """All but the newest token is computed, or will be when the steps in flight are over."""
        return self.num_uncomputed == 1 and self.num_output_tokens + self.num_awaited > 0

    @property
    def is_prefilling(self) -> bool:
        """Some tokens before the newest are not computed yet, or the first is not sampled."""
        is_running = self.state is SequenceState.RUNNING
        return is_running and self.num_uncomputed > 0 and not self.is_decoding

    def goes_on(self, context_len: int) -> bool:
        """More tokens are wanted than are known and awaited."""
        num_left = self.num_tokens_left(context_len)
        return self.state is SequenceState.RUNNING and num_left > self.num_awaited

    def take_off(self, row: Row) -> None:
        """`row` of it is being computed."""
        self.num_flights += 1
        self.num_flying += row.num_tokens
        self.num_awaited += row.num_sampled

    def land(self, row: Row) -> None:
        self.num_flights -= 1
        self.num_flying -= row.num_tokens
        self.num_awaited -= row.num_sampled

    def add_drafts(self, row: Row) -> Draft:
        """Its `draft_ids` join `row`, which computes its newest token."""
        self.land(row)
        row.num_tokens += len(self.draft_ids)
        row.num_sampled += len(self.draft_ids)
        self.take_off(row)
        return Draft(row.slot, self.num_tokens, self.draft_ids)

    def num_tokens_left(self, context_len: int) -> int:
        """Most tokens that can still be sampled after those that are known."""
        num_output_left = self.sampling.max_tokens - self.num_output_tokens
        return min(num_output_left, context_len - self.num_tokens)

    @property
    def may_start(self) -> bool:
        """False while the leader still computes the prompt that this sequence will share."""
        leader = self.leader
        return leader is None or leader.state is SequenceState.ENDED or leader.num_output_tokens > 0

    def hashes(self, num_blocks: int, block_size: int) -> list[BlockHash]:
        """Names of the first `num_blocks` blocks, all of them full of known tokens."""
        while len(self._hashes) < num_blocks:
            parent = self._hashes[-1] if self._hashes else root_hash(self.cache_salt)
            start = len(self._hashes) * block_size
            self._hashes.append(chain_hash(parent, self.token_ids[start : start + block_size]))
        return self._hashes[:num_blocks]

    def admission(self) -> Admission:
        """What the worker must know of it, now that it has a slot."""
        return Admission(
            slot=self.slot,
            token_ids=list(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            sampling=self.sampling,
            sample_index=self.index,
            min_tokens_stop_ids=tuple(sorted(self.stop_ids)),
        )

    def take(self, sampled: list[Sampled], context_len: int) -> Output:
        """Gains tokens, up to the one that ends it, and says so."""
        output = Output(self.request_id, self.index, [])
        if self.num_output_tokens == 0:
            output.num_cached_tokens = self.num_cached_tokens
            output.first_scheduled_s = self.first_scheduled_s
        for token_id, logprobs in sampled:
            output.finish_reason = self._append(token_id, context_len)
            if output.finish_reason is FinishReason.ERROR:
                output.error = "the model's logits for this sequence were not finite"
                break
            output.token_ids.append(token_id)
            if logprobs is not None:
                output.add_logprobs(logprobs.chosen, logprobs.top_ids, logprobs.top)
            if output.finish_reason is FinishReason.STOP:
                output.stop_token_id = token_id
            if output.finish_reason is not FinishReason.NONE:
                break
        return output

    def _append(self, token_id: int, context_len: int) -> FinishReason:
        """Takes a sampled token and says whether it was the last."""
        if token_id < 0:
            return FinishReason.ERROR
        self.token_ids.append(token_id)
        if token_id in self.stop_ids and self.num_output_tokens > self.sampling.min_tokens:
            return FinishReason.STOP
        if self.num_tokens_left(context_len) <= 0:
            return FinishReason.LENGTH
        return FinishReason.NONE


def sequences_of(submit: Submit, eos_token_ids: frozenset[int]) -> list[Sequence]:
    """The request's n samples, the first of which leads the others."""
    stop_ids = frozenset(submit.sampling.stop_token_ids)
    if not submit.sampling.ignore_eos:
        stop_ids |= eos_token_ids
    leader = Sequence(submit, 0, stop_ids, None)
    others = (Sequence(submit, i, stop_ids, leader) for i in range(1, submit.sampling.n))
    return [leader, *others]
