"""A mixed step's input tensors, as a plain loop over its tokens computes them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.engine.step import Admission, Draft, Growth, Row, Step
from pilotlight.engine.worker.inputs import InputBuffers, StepInputs
from pilotlight.engine.worker.slots import SlotTables
from pilotlight.engine.worker.staging import OneMemory

NUM_SLOTS = 6
CONTEXT_LEN = 37
"""Not a multiple of the block size."""
BLOCK_SIZE = 4
MAX_NUM_TOKENS = 64


@dataclass
class Expected:
    """Filled token by token and row by row."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    query_start: list[int] = field(default_factory=lambda: [0])
    context_lens: list[int] = field(default_factory=list)
    table_slots: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


class Worker:
    """Slot tables and buffers beside plain lists that hold the same."""

    def __init__(self, seed: int = 0) -> None:
        self._dice = random.Random(seed)
        self._tables = SlotTables(NUM_SLOTS, CONTEXT_LEN, BLOCK_SIZE)
        self.buffers = InputBuffers(
            self._tables, MAX_NUM_TOKENS, NUM_SLOTS + 4, BLOCK_SIZE, OneMemory()
        )
        self._tokens: dict[int, list[int]] = {}
        self.blocks: dict[int, list[int]] = {}

    def admission(self, slot: int, num_tokens: int) -> Admission:
        self._tokens[slot] = [self._dice.randrange(500) for _ in range(num_tokens)]
        self.blocks[slot] = []
        return Admission(slot, self._tokens[slot], num_tokens, SamplingParams(), 0, ())

    def growth(self, slot: int, num_blocks: int) -> Growth:
        first = len(self.blocks[slot])
        block_ids = [self._dice.randrange(1000) for _ in range(num_blocks)]
        self.blocks[slot] += block_ids
        return Growth(slot, first, block_ids)

    def draft(self, slot: int, num_tokens: int) -> Draft:
        token_ids = [self._dice.randrange(500) for _ in range(num_tokens)]
        first = len(self._tokens[slot])
        self._tokens[slot] = self._tokens[slot] + token_ids
        return Draft(slot, first, token_ids)

    def check(self, step: Step) -> None:
        self._tables.apply(step)
        inputs = self.buffers.fill(step)
        expected = self._expected(step)
        self._check_tokens(inputs, expected)
        tables = inputs.batch.block_tables.tolist()
        rows = zip(expected.table_slots, expected.context_lens, tables, strict=True)
        for slot, context_len, table in rows:
            num_blocks = -(-context_len // BLOCK_SIZE)
            assert table[:num_blocks] == self.blocks[slot][:num_blocks]

    def _expected(self, step: Step) -> Expected:
        expected = Expected()
        for row in step.rows:
            end = row.start + row.num_tokens
            for position in range(row.start, end):
                block_id = self.blocks[row.slot][position // BLOCK_SIZE]
                expected.token_ids.append(self._tokens[row.slot][position])
                expected.positions.append(position)
                expected.cells.append(block_id * BLOCK_SIZE + position % BLOCK_SIZE)
                if position >= end - row.num_sampled:
                    expected.sampled.append(len(expected.positions) - 1)
                    expected.slots.append(row.slot)
                    expected.lengths.append(position + 1)
                if row.num_sampled > 1 or position == end - 1:
                    expected.query_start.append(len(expected.positions))
                    expected.context_lens.append(position + 1)
                    expected.table_slots.append(row.slot)
        return expected

    def _check_tokens(self, inputs: StepInputs, expected: Expected) -> None:
        batch = inputs.batch
        assert inputs.token_ids.tolist() == expected.token_ids
        assert batch.positions.tolist() == expected.positions
        assert batch.slot_mapping.tolist() == expected.cells
        assert batch.query_start.tolist() == expected.query_start
        assert batch.context_lens.tolist() == expected.context_lens
        assert inputs.sampled.tolist() == expected.sampled
        assert inputs.slots.tolist() == expected.slots
        assert inputs.lengths.tolist() == expected.lengths


MIXED_ROWS = [Row(4, 8, 1, 1), Row(1, 3, 7, 0), Row(5, 0, 37, 1), Row(0, 0, 1, 0)]
"""A decode, a chunk from the middle of a block, a whole context, a first token only."""


def _mixed_step(worker: Worker) -> Step:
    admitted = [worker.admission(slot, n) for slot, n in ((4, 9), (1, 30), (5, 37), (0, 5))]
    grown = [worker.growth(slot, n) for slot, n in ((4, 3), (1, 8), (5, 10), (0, 2))]
    return Step(0, admitted=admitted, grown=grown, rows=MIXED_ROWS)


def test_a_mixed_step() -> None:
    worker = Worker()
    worker.check(_mixed_step(worker))


def test_a_smaller_step_after_it_sees_nothing_of_it() -> None:
    worker = Worker()
    worker.check(_mixed_step(worker))
    worker.check(Step(1, rows=[Row(1, 10, 2, 0)]))


def test_a_table_grows_where_it_ended() -> None:
    worker = Worker()
    admitted = [worker.admission(2, 20)]
    worker.check(Step(0, admitted=admitted, grown=[worker.growth(2, 2)], rows=[Row(2, 0, 8, 1)]))
    worker.check(Step(1, grown=[worker.growth(2, 1)], rows=[Row(2, 8, 4, 0)]))
    worker.check(Step(2, grown=[worker.growth(2, 2)], rows=[Row(2, 9, 11, 1)]))


def test_a_slot_that_is_taken_again_starts_anew() -> None:
    worker = Worker()
    worker.check(_mixed_step(worker))
    admitted = [worker.admission(5, 6)]
    step = Step(1, released=[5], admitted=admitted, grown=[worker.growth(5, 2)])
    step.rows.append(Row(5, 0, 6, 1))
    worker.check(step)


def test_tokens_with_drafts_are_rows_of_their_own() -> None:
    """Beside a prompt's chunk, which stays one row."""
    worker = Worker()
    admitted = [worker.admission(slot, n) for slot, n in ((3, 6), (0, 30), (2, 4))]
    grown = [worker.growth(slot, n) for slot, n in ((3, 3), (0, 8), (2, 1))]
    worker.check(Step(0, admitted=admitted, grown=grown, rows=[Row(2, 0, 4, 1)]))
    rows = [Row(3, 5, 5, 5), Row(2, 3, 1, 1), Row(0, 7, 9, 0)]
    worker.check(Step(1, drafted=[worker.draft(3, 4)], rows=rows))


@pytest.mark.parametrize("seed", range(20))
def test_random_steps(seed: int) -> None:
    worker, dice = Worker(seed), random.Random(seed)
    for index in range(5):
        lengths = {slot: dice.randint(1, 12) for slot in dice.sample(range(NUM_SLOTS), 4)}
        step = Step(index, admitted=[worker.admission(s, n) for s, n in lengths.items()])
        step.grown = [worker.growth(slot, 3) for slot in lengths]
        for slot, length in lengths.items():
            start = dice.randrange(length)
            step.rows.append(Row(slot, start, dice.randint(1, length - start), dice.randint(0, 1)))
        worker.check(step)


@pytest.mark.parametrize("seed", range(20))
def test_decodes_that_go_on(seed: int) -> None:
    """Step after step; now and then one leaves or comes, guesses, or a graph is captured."""
    worker, dice = Worker(seed), random.Random(seed)
    starts: dict[int, int] = {}
    for index in range(40):
        step = Step(index)
        if starts and dice.random() < 0.1:
            del starts[dice.choice(list(starts))]
        if len(starts) < 4 and dice.random() < 0.3:
            slot = dice.choice([s for s in range(NUM_SLOTS) if s not in starts])
            step.admitted = [worker.admission(slot, CONTEXT_LEN)]
            starts[slot] = dice.randrange(8)
            step.grown = [worker.growth(slot, 2)]
        for slot, start in starts.items():
            if start // BLOCK_SIZE >= len(worker.blocks[slot]):
                step.grown.append(worker.growth(slot, 1))
            step.rows.append(Row(slot, start, 1, 1))
        starts = {slot: start + 1 for slot, start in starts.items() if start + 2 < CONTEXT_LEN}
        if dice.random() < 0.1:
            worker.buffers.blank(2)
        if step.rows:
            worker.check(step)
