"""One sequence of tokens on its way: what was asked, what is known, what is computed.

Knows no pool, no batch and no device.

    token_ids   [ prompt ............ | generated ......... ]
    computed    [ KV is in the blocks ......... ]
    published   [ full blocks others may find ]
    block_ids   [ room for token_ids, at least up to computed ]
"""

from __future__ import annotations

from enum import Enum

from .block_pool import BlockHash, chain_hash, root_hash
from .messages import FinishReason, Submit


class SequenceState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    """Waiting again: its blocks were taken, its tokens are kept."""
    ENDED = "ended"


class Sequence:
    """Sample `index` of a request. Samples after the first wait for the `leader`'s prompt."""

    __slots__ = (
        "_hashes", "block_ids", "cache_salt", "first_scheduled_s", "index", "is_in_flight",
        "leader", "num_cached_tokens", "num_computed", "num_prompt_tokens", "num_published",
        "request_id", "sampling", "slot", "state", "stop_ids", "token_ids",
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
        self.slot = -1
        self.is_in_flight = False
        self.block_ids: list[int] = []
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
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """All but the newest token is computed."""
        return self.num_uncomputed == 1 and self.num_output_tokens > 0

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

    def append(self, token_id: int, context_len: int) -> FinishReason:
        """Takes a sampled token and says whether it was the last."""
        self.token_ids.append(token_id)
        if token_id in self.stop_ids and self.num_output_tokens > self.sampling.min_tokens:
            return FinishReason.STOP
        is_full = self.num_output_tokens >= self.sampling.max_tokens
        if is_full or self.num_tokens >= context_len:
            return FinishReason.LENGTH
        return FinishReason.NONE
