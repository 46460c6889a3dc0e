"""What steps take of a card: measured at the first boot, kept beside the artefact, used at all."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pilotlight.engine.boot import boot
from pilotlight.engine.boot_report import Unheard
from pilotlight.engine.config import EngineConfig
from pilotlight.engine.errors import NotEnoughMemory
from pilotlight.engine.last_plan import LastPlan, asked_of, read_plan, write_plan
from pilotlight.engine.worker import load
from pilotlight.engine.worker.inputs import InputBuffers, StepInputs
from pilotlight.engine.worker.rehearsal import WorkingMemory, rehearse
from pilotlight.engine.worker.runner import Runner
from pilotlight.engine.worker.slots import SlotTables
from pilotlight.engine.worker.staging import OneMemory
from pilotlight.server.config import DEMO_MODEL
from pilotlight.tests.worker.fake_device import FakeGraphs

GRAPHS, ACTIVATIONS = 5 << 20, 7 << 20


class FakeMeter:
    """Says what is left alive of those that were rehearsed."""

    def __init__(self) -> None:
        self.num_starts = 0
        self.runners: list[weakref.ref[Runner]] = []
        self.num_alive = -1

    def start(self) -> None:
        self.num_starts += 1

    def held_bytes(self) -> int:
        return GRAPHS

    def most_bytes(self) -> int:
        return ACTIVATIONS

    def release(self) -> None:
        gc.collect()
        self.num_alive = sum(runner() is not None for runner in self.runners)


class Boots:
    """Boots of the demo model on a device that is not there; what each cache was planned with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.meter = FakeMeter()
        self.working_bytes: list[int] = []
        plan_kv_cache, runners = load.plan_kv_cache, self.meter.runners

        class Watched(Runner):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                runners.append(weakref.ref(self))

        def planned(*args: Any) -> Any:
            self.working_bytes.append(args[-1])
            return plan_kv_cache(*args)

        monkeypatch.setattr(load, "Runner", Watched)
        monkeypatch.setattr(load, "plan_kv_cache", planned)
        monkeypatch.setattr(load, "_graphs_for", lambda device, kernels, kv_dtype: FakeGraphs())
        monkeypatch.setattr(load, "meter_for", lambda device: self.meter)

    def boot(self, **settings: Any) -> Any:
        return boot(config_of(**settings), Unheard(), lambda: None)


def config_of(**settings: Any) -> EngineConfig:
    few = {"max_num_seqs": 4, "max_batched_tokens": 64, "max_model_len": 100, "num_threads": 1}
    return EngineConfig(model=str(DEMO_MODEL), device="cpu", **(few | settings))


def test_a_first_boot_measures_and_says_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    boots = Boots(monkeypatch)
    facts = boots.boot().facts
    assert (facts.graph_bytes, facts.activation_bytes) == (GRAPHS, ACTIVATIONS)
    assert boots.working_bytes == [GRAPHS + ACTIVATIONS]
    assert boots.meter.num_starts == 2
    assert boots.meter.num_alive == 0, "the rehearsal's runner was kept, and its graphs with it"
    assert len(boots.meter.runners) == 2


def test_a_boot_that_knows_does_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    boots = Boots(monkeypatch)
    known = LastPlan(asked_of(config_of()), "", 16, 100, graph_bytes=1, activation_bytes=2)
    monkeypatch.setattr(load, "read_plan", lambda found, config, card: known)
    facts = boots.boot().facts
    assert boots.meter.num_starts == 0
    assert (facts.graph_bytes, facts.activation_bytes, facts.num_blocks) == (1, 2, 16)
    assert boots.working_bytes == [3]


def test_nothing_is_measured_for_a_cache_of_given_size(monkeypatch: pytest.MonkeyPatch) -> None:
    boots = Boots(monkeypatch)
    boots.boot(kv_cache_bytes=8 << 20)
    assert boots.meter.num_starts == 0


class OneFile:
    def __init__(self) -> None:
        self.content: bytes | None = None

    def read_plan(self, key: str) -> bytes | None:
        return self.content

    def write_plan(self, key: str, content: bytes) -> None:
        self.content = content


def test_what_was_measured_is_kept_for_the_same_card_and_the_same_wishes() -> None:
    found: Any = SimpleNamespace(store=OneFile(), key="any")
    facts: Any = SimpleNamespace(
        card="a card", num_blocks=9, context_len=90, graph_bytes=1, activation_bytes=2
    )
    write_plan(found, config_of(), facts)
    plan = read_plan(found, config_of(), "a card")
    assert plan is not None
    assert (plan.num_blocks, plan.graph_bytes, plan.activation_bytes) == (9, 1, 2)
    assert read_plan(found, config_of(), "another card") is None
    assert read_plan(found, config_of(max_batched_tokens=65), "a card") is None
    assert read_plan(found, config_of(attention="reference"), "a card") is None


@pytest.mark.parametrize("where", ["make", "rehearse"])
def test_a_step_that_does_not_fit_says_what_to_do(where: str) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    def make() -> Any:
        return SimpleNamespace(rehearse=full) if where == "rehearse" else full()

    with pytest.raises(NotEnoughMemory, match=r"3 GiB.*lower --max-batched-tokens"):
        rehearse(make, FakeMeter())


def test_both_parts_count() -> None:
    assert WorkingMemory(3, 4).num_bytes == 7


@pytest.mark.parametrize(
    ("num_slots", "max_tokens", "context_len", "rows", "tokens"),
    [(4, 64, 48, 2, 64), (4, 64, 640, 1, 64), (2, 64, 16, 2, 32), (4, 3, 16, 1, 3)],
)
def test_the_largest_step_is_as_large_as_may_be(
    num_slots: int, max_tokens: int, context_len: int, rows: int, tokens: int
) -> None:
    block_size, padding = 16, 77
    tables = SlotTables(num_slots, context_len, block_size)
    buffers = InputBuffers(tables, max_tokens, num_slots, block_size, OneMemory(), padding)
    inputs = buffers.largest()
    assert_is_padding(inputs, padding)
    batch = inputs.batch
    assert len(inputs.token_ids) == batch.query_start[-1] == tokens
    assert len(batch.context_lens) == rows
    assert len(inputs.sampled) == min(num_slots, tokens)
    queries = batch.query_start.diff()
    assert (queries > 0).all()
    assert (batch.context_lens >= queries).all()
    assert batch.context_lens.max() == context_len, "the last is a late part of a long prompt"
    assert batch.context_lens.max() <= batch.block_tables.shape[1] * block_size


def assert_is_padding(inputs: StepInputs, padding: int) -> None:
    assert (inputs.batch.slot_mapping == -1).all()
    assert (inputs.batch.block_tables == padding).all()
    assert not inputs.is_decode
