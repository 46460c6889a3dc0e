"""The pool alone: random holders against a slow model of what must be findable."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pilotlight.engine.block_pool import BlockPool, chain_hash, root_hash


class PoolMachine(RuleBasedStateMachine):
    """Holders of block lists come and go; contents are named by small integers."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.holders: list[list[int]] = []
        self.contents: dict[bytes, int] = {}

    @rule(num_blocks=st.integers(1, 5), content=st.integers(0, 6))
    def allocate_and_publish(self, num_blocks: int, content: int) -> None:
        if num_blocks > self.pool.num_free:
            return
        block_ids = self.pool.allocate(num_blocks)
        self.holders.append(block_ids)
        for i, block_id in enumerate(block_ids[:-1]):
            self.pool.publish(block_id, b"%d/%d" % (content, i))

    @rule(content=st.integers(0, 6), num_blocks=st.integers(1, 5))
    def share(self, content: int, num_blocks: int) -> None:
        found = self.pool.find_prefix([b"%d/%d" % (content, i) for i in range(num_blocks)])
        num_free_before = self.pool.num_free
        expected = self.pool.num_free_after_holding(found)
        self.pool.hold(found)
        assert self.pool.num_free == expected <= num_free_before
        self.holders.append(found)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        self.pool.release(self.holders.pop(index))

    @rule()
    def forget(self) -> None:
        self.pool.forget_prefixes()
        assert self.pool.find_prefix([b"0/0"]) == []

    @invariant()
    def integrity(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_references == sum(map(len, self.holders))
        held = {b for holder in self.holders for b in holder}
        assert self.pool.num_free == 12 - len(held)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def hashes(*contents: list[int], salt: str = "") -> list[bytes]:
    chain, parent = [], root_hash(salt)
    for tokens in contents:
        parent = chain_hash(parent, tokens)
        chain.append(parent)
    return chain


def test_a_released_prefix_is_found_again() -> None:
    pool = BlockPool(4)
    blocks, names = pool.allocate(2), hashes([1, 2], [3, 4])
    for block_id, name in zip(blocks, names, strict=True):
        pool.publish(block_id, name)
    pool.release(blocks)
    assert pool.find_prefix(names) == blocks
    assert pool.num_free == 4


def test_the_same_tokens_after_another_beginning_are_another_block() -> None:
    assert hashes([1, 2], [3, 4])[1] != hashes([9, 9], [3, 4])[1]


def test_salts_separate() -> None:
    assert hashes([1, 2], salt="a") != hashes([1, 2], salt="b")


def test_the_least_recently_released_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    old_names, new_names = hashes([1], [2]), hashes([3], [4])
    for block_id, name in zip(old + new, old_names + new_names, strict=True):
        pool.publish(block_id, name)
    pool.release(old)
    pool.release(new)
    assert pool.allocate(1) == [old[1]]
    assert pool.find_prefix(old_names) == [old[0]]
    assert pool.find_prefix(new_names) == new


def test_blank_blocks_are_used_before_a_prefix_is_evicted() -> None:
    pool = BlockPool(3)
    block = pool.allocate(1)
    pool.publish(block[0], hashes([1])[0])
    pool.release(block)
    pool.release(pool.allocate(2))
    pool.allocate(2)
    assert pool.find_prefix(hashes([1])) == block


def test_releasing_twice_is_our_own_mistake() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.release(blocks)
