"""Blocks of KV cache: who holds which, and which free ones still hold a reusable prefix.

Knows block ids, reference counts and chained hashes. Knows no tensors, sequences or requests.

Every block is in exactly one of three places:

    held    referenced by one or more sequences
    cached  free, but its contents can be found by hash; evicted least recently released first
    blank   free, holds nothing of use; handed out before anything is evicted
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

BlockHash = bytes


def chain_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Name of a full block: its tokens and everything before them.

    A cryptographic hash, so that no prompt can be crafted to find another prompt's block.
    """
    return hashlib.blake2b(array("q", token_ids).tobytes(), key=parent, digest_size=32).digest()


def root_hash(salt: str) -> BlockHash:
    """Parent of a sequence's first block; sequences share blocks only under equal salts."""
    return hashlib.blake2b(salt.encode(), digest_size=32).digest()


@dataclass(frozen=True, slots=True)
class BlockPoolStatistics:
    num_blocks: int
    num_held: int
    num_cached: int
    num_blank: int


class BlockPool:
    """`num_blocks` blocks, all blank at first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._block_by_hash: dict[BlockHash, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def num_references(self) -> int:
        return sum(self._ref_counts)

    def find_prefix(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The blocks of the longest known prefix. Takes no reference: see `hold`."""
        found = []
        for block_hash in hashes:
            block_id = self._block_by_hash.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def num_free_after_holding(self, block_ids: Iterable[int]) -> int:
        return self.num_free - sum(self._ref_counts[b] == 0 for b in block_ids)

    def hold(self, block_ids: Iterable[int]) -> None:
        """Adds a reference to blocks that `find_prefix` returned."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._cached[block_id]
            self._ref_counts[block_id] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Blocks with one reference each and no contents. The caller has checked `num_free`.

        They ascend: neighbours, read one after the other, then come from memory at a better rate.
        """
        assert num_blocks <= self.num_free, f"{num_blocks} blocks asked, {self.num_free} free"
        return sorted(self._allocate_one() for _ in range(num_blocks))

    def _allocate_one(self) -> int:
        block_id = self._blank.pop() if self._blank else self._evict()
        self._ref_counts[block_id] = 1
        return block_id

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        self._forget(block_id)
        return block_id

    def _forget(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            del self._block_by_hash[block_hash]
            self._hashes[block_id] = None

    def publish(self, block_id: int, block_hash: BlockHash) -> None:
        """The block is full and computed: others may find it. The first of two equals wins."""
        assert self._ref_counts[block_id] > 0, f"block {block_id} is not held"
        if self._hashes[block_id] is None and block_hash not in self._block_by_hash:
            self._hashes[block_id] = block_hash
            self._block_by_hash[block_hash] = block_id

    def release(self, block_ids: Sequence[int]) -> None:
        """Drops one reference each. The end of a prefix is evicted before its beginning."""
        for block_id in reversed(block_ids):
            assert self._ref_counts[block_id] > 0, f"block {block_id} released twice"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._settle(block_id)

    def _settle(self, block_id: int) -> None:
        if self._hashes[block_id] is None:
            self._blank.append(block_id)
        else:
            self._cached[block_id] = None

    def forget_prefixes(self) -> None:
        """Empties the prefix cache; held blocks stay held but can no longer be found."""
        for block_id in range(self.num_blocks):
            self._forget(block_id)
        self._blank.extend(self._cached)
        self._cached.clear()

    def statistics(self) -> BlockPoolStatistics:
        num_free = self.num_free
        return BlockPoolStatistics(
            self.num_blocks, self.num_blocks - num_free, len(self._cached), len(self._blank)
        )

    def check_integrity(self) -> None:
        """Raises AssertionError when a block is in no place, or in two."""
        free = [*self._blank, *self._cached]
        assert len(free) == len(set(free)), "a block is free twice"
        assert min(self._ref_counts, default=0) >= 0, "a reference count is negative"
        assert sum(c == 0 for c in self._ref_counts) == len(free), "a free block is referenced"
        assert all(self._ref_counts[b] == 0 for b in free), "a referenced block is free"
        assert all(self._hashes[b] is None for b in self._blank), "a blank block has a hash"
        assert all(self._hashes[b] is not None for b in self._cached), "a cached block has no hash"
        known = {h: b for b, h in enumerate(self._hashes) if h is not None}
        assert known == self._block_by_hash, "the hash index and the blocks disagree"
