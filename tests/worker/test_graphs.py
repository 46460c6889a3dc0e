"""Graphs of decode steps: sizes, padding, fallback, and the same tokens as without them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pilotlight.engine.core import EngineCore
from pilotlight.engine.models.decoder import AttentionBatch
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.engine.step import Admission, Growth, Row, Step
from pilotlight.engine.worker import load
from pilotlight.engine.worker.graphs import GraphedDecodes, sizes_up_to
from pilotlight.engine.worker.inputs import InputBuffers, StepInputs
from pilotlight.engine.worker.slots import SlotTables
from pilotlight.engine.worker.staging import OneMemory
from pilotlight.server.config import DEMO_MODEL
from pilotlight.tests.models.checkpoints import cpu_engine, engine_tokens, prompt_of
from pilotlight.tests.worker.fake_device import FakeGraphs, LateCopies

PROMPTS = [prompt_of(length, seed=length) for length in (1, 5, 20)]
PADDING_BLOCK = 99


def booted(graphs: FakeGraphs | None, monkeypatch: pytest.MonkeyPatch) -> EngineCore:
    monkeypatch.setattr(load, "_graphs_for", lambda device, kernels, kv_dtype: graphs)
    return cpu_engine(DEMO_MODEL, dtype="float32", speculative="off", max_model_len=100)


def inputs_of(num_rows: int, is_decode: bool = True) -> StepInputs:
    ids, nothing = torch.arange(num_rows, dtype=torch.int32), np.zeros(0, dtype=np.int32)
    batch = AttentionBatch(ids, ids, ids, ids, ids)
    return StepInputs(ids, batch, ids, nothing, nothing, ids, ids, True, is_decode)


def decodes_with(graphs: FakeGraphs, max_num_rows: int) -> GraphedDecodes:
    return GraphedDecodes(
        lambda inputs: (inputs.token_ids.float(),), inputs_of, graphs, max_num_rows, lambda: None
    )


def captured_all(decodes: GraphedDecodes, max_num_rows: int) -> GraphedDecodes:
    decodes.capture_first()
    for _ in sizes_up_to(max_num_rows):
        decodes.capture_next()
    return decodes


@pytest.mark.parametrize("refused", [frozenset(), frozenset({2, 4})])
def test_tokens_are_those_of_an_engine_without_graphs(
    refused: frozenset[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = FakeGraphs(refused)
    tokens = engine_tokens(booted(graphs, monkeypatch), PROMPTS, 20)
    assert tokens == engine_tokens(booted(None, monkeypatch), PROMPTS, 20)
    # Three sequences decode in a graph of four rows, or, where there is none, of eight.
    assert (8 if refused else 4) in graphs.replayed


def test_padding_leaves_every_block_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    core = booted(FakeGraphs(), monkeypatch)
    engine_tokens(core, PROMPTS, 4)
    runner: Any = core._runner
    caches = [half for cache in runner._caches for half in (cache.k, cache.v)]
    assert not any(half[-1].any() for half in caches), "the scheduler gave padding's block away"
    with torch.inference_mode():
        for half in caches:
            half.fill_(0.5)  # what no token would leave
        runner._decodes.run(runner._inputs.blank(4))
    assert all(bool((half == 0.5).all()) for half in caches)


def test_padding_is_in_nobodys_block_and_in_no_cell() -> None:
    buffers = step_buffers(OneMemory())
    inputs = buffers.fill(Step(0, rows=[Row(0, 2, 1, 1)]), lambda n: 4)
    batch = inputs.batch
    assert len(inputs.token_ids) == 4
    assert len(inputs.slots) == 1
    assert batch.slot_mapping.tolist() == [7 * 4 + 2, -1, -1, -1]
    assert batch.block_tables[1:].unique().tolist() == [PADDING_BLOCK]
    assert batch.query_start.tolist() == [0, 1, 2, 3, 4]
    assert batch.context_lens.tolist() == [3, 1, 1, 1]


def test_the_largest_is_captured_first_and_the_collector_sleeps() -> None:
    graphs = FakeGraphs()
    decodes = decodes_with(graphs, 20)
    decodes.capture_first()
    assert graphs.captured == [20, 8, 4, 2, 1]
    decodes.capture_next()
    decodes.capture_next()
    assert graphs.captured == [20, 8, 4, 2, 1, 16]
    assert not any(graphs.collector_was_on)


def test_what_has_no_graph_runs_call_by_call() -> None:
    graphs = FakeGraphs(refused=frozenset({8}))
    decodes = captured_all(decodes_with(graphs, 8), 8)
    assert [decodes.num_padded(n) for n in (1, 3, 4, 5, 8, 9)] == [1, 4, 4, 5, 8, 9]
    for inputs in (inputs_of(8), inputs_of(5), inputs_of(4, is_decode=False)):
        assert torch.equal(decodes.run(inputs)[0], inputs.token_ids.float())
    assert graphs.replayed == []


@pytest.mark.parametrize("max_num_rows", [1, 3, 8, 80, 100])
def test_every_number_of_rows_has_a_graph_close_above(max_num_rows: int) -> None:
    decodes = captured_all(decodes_with(FakeGraphs(), max_num_rows), max_num_rows)
    for n in range(1, max_num_rows + 1):
        assert n <= decodes.num_padded(n) < min(2 * n, n + 8)


def step_buffers(staging: OneMemory | LateCopies) -> InputBuffers:
    tables = SlotTables(2, 20, 4)
    admission = Admission(0, [11, 12, 13], 3, SamplingParams(), 0, ())
    tables.apply(Step(0, admitted=[admission], grown=[Growth(0, 0, [7])]))
    return InputBuffers(tables, 16, 4, 4, staging, PADDING_BLOCK)


class Unfenced(LateCopies):
    """As if nobody waited: what was begun is read at the very end."""

    def wait(self) -> None:
        pass

    def finish(self) -> None:
        super().wait()


def test_a_buffer_is_not_written_while_its_copy_is_under_way() -> None:
    copies = LateCopies()
    buffers = step_buffers(copies)
    buffers.fill(Step(0, rows=[Row(0, 0, 2, 0)]))
    buffers.fill(Step(1, rows=[Row(0, 2, 1, 1)]))
    assert [11, 12] in copies.arrived


def test_the_copies_notice_a_buffer_that_was_overwritten() -> None:
    copies = Unfenced()
    buffers = step_buffers(copies)
    buffers.fill(Step(0, rows=[Row(0, 0, 2, 0)]))
    buffers.fill(Step(1, rows=[Row(0, 2, 1, 1)]))
    copies.finish()
    assert [11, 12] not in copies.arrived
    assert [13, 12] in copies.arrived
