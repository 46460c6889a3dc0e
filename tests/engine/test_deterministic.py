"""The rows a sequence is computed in, with --deterministic: the same whatever else runs."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pilotlight.engine.chunks import Chunks, fixed_chunks
from pilotlight.engine.errors import ConfigError
from pilotlight.engine.messages import Submit
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.engine.scheduler import Scheduler
from pilotlight.engine.step import Row
from pilotlight.tests.fake_runner import KvCheckingRunner, tokens_alone

BLOCK_SIZE, VOCAB_SIZE = 4, 50
Asked = tuple[int, int, int, int]
"""Prompt's length, its family, max_tokens, steps before it arrives."""

asked = st.lists(
    st.tuples(st.integers(1, 45), st.integers(0, 1), st.integers(1, 12), st.integers(0, 9)),
    min_size=1,
    max_size=8,
)


def prompt_of(length: int, family: int) -> list[int]:
    return [(family * 7 + p) % VOCAB_SIZE for p in range(length)]


def rows_of(asked: list[Asked], **settings) -> dict[str, list[tuple[int, int, int]]]:
    """Of each request, the rows that were computed of it: start, tokens, samples."""
    limits = {"num_blocks": 60, "max_num_seqs": 4, "max_batched_tokens": 16}
    scheduler = Scheduler(
        **(limits | settings), block_size=BLOCK_SIZE, context_len=60, eos_token_ids=[],
        deterministic=True,
    )  # fmt: skip
    runner = KvCheckingRunner((limits | settings)["num_blocks"], BLOCK_SIZE, VOCAB_SIZE)
    rows: dict[str, list[Row]] = defaultdict(list)
    for now in range(1000):
        for i, (length, family, max_tokens, arrives) in enumerate(asked):
            if arrives == now:
                sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
                scheduler.add(Submit(f"r{i}", prompt_of(length, family), sampling))
        step = scheduler.schedule()
        if step is not None:
            of_slot = {s.slot: s.request_id for s in scheduler._running}
            for row in step.rows:
                rows[of_slot[row.slot]].append(row)
            scheduler.apply(step, runner.run(step), 1.0)
            scheduler.check_integrity()
        elif now > 9 and not scheduler.has_work:
            assert scheduler.statistics().num_preemptions == 0
            return {
                name: [(r.start, r.num_tokens, r.num_sampled) for r in r_]
                for name, r_ in rows.items()
            }
    raise AssertionError("a request starves")


@settings(max_examples=100, deadline=None)
@given(asked, st.integers(20, 60))
def test_each_is_computed_in_the_rows_it_has_alone(asked: list[Asked], num_blocks: int) -> None:
    """Or in the last of them, where the first were found in the cache."""
    among_others = rows_of(asked, num_blocks=num_blocks)
    for i, (length, family, max_tokens, _) in enumerate(asked):
        alone = rows_of([(length, family, max_tokens, 0)])["r0"]
        got = among_others[f"r{i}"]
        assert got == alone[len(alone) - len(got) :]
        found = got[0][0]
        assert found % 12 == 0, "only whole rows of prompts are shared"


def test_the_rows_are_cut_where_a_multiple_ends() -> None:
    rows = rows_of([(30, 0, 3, 0)])["r0"]
    assert rows == [(0, 12, 0), (12, 12, 0), (24, 6, 1), (30, 1, 1), (31, 1, 1)]


def test_what_came_out_of_decodes_is_not_shared() -> None:
    """The second prompt is the first one and its answer."""
    prompt = prompt_of(12, 0)
    answer = tokens_alone(prompt, 24, VOCAB_SIZE)
    scheduler = Scheduler(
        num_blocks=60, block_size=4, context_len=60, eos_token_ids=[], max_num_seqs=4,
        max_batched_tokens=16, deterministic=True,
    )  # fmt: skip
    runner = KvCheckingRunner(60, 4, VOCAB_SIZE)
    found = []
    for name, tokens in (("a", prompt), ("b", prompt + answer)):
        scheduler.add(Submit(name, tokens, SamplingParams(temperature=0.0, max_tokens=24)))
        while scheduler.has_work:
            step = scheduler.schedule()
            outputs = scheduler.apply(step, runner.run(step), 1.0)
            found += [o.num_cached_tokens for o in outputs if o.first_scheduled_s]
    assert found == [0, 12]


def test_chunks_as_the_step_has_room() -> None:
    chunks = Chunks(0, 4)
    assert chunks.num_tokens(5, 30, 7) == 7
    assert chunks.num_shared_blocks(11) == 2
    assert not chunks.are_fixed


def test_a_budget_without_room_for_a_block_is_refused() -> None:
    assert fixed_chunks(64, 2048, 16).num_tokens(0, 10_000, 2048) == 512
    with pytest.raises(ConfigError, match=r"max_batched_tokens is 70.*64.*16"):
        fixed_chunks(64, 70, 16)
