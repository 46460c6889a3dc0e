"""What an engine may take of a card, and how it is told by how much something does not fit."""

from __future__ import annotations

from pathlib import Path

import pilotlight
import pytest
import torch
from pilotlight.engine.config import EngineConfig
from pilotlight.engine.errors import NotEnoughMemory
from pilotlight.engine.models.config import read_model_config
from pilotlight.engine.worker import memory
from pilotlight.engine.worker.kv_cache import plan_kv_cache
from pilotlight.engine.worker.memory import CardMemory, check_weights_fit, later_bytes, left_bytes

DEMO = Path(pilotlight.__file__).parent / "demo" / "model"
GIB = 1 << 30
CUDA = torch.device("cuda")


def config(**settings) -> EngineConfig:
    return EngineConfig(model=str(DEMO), **settings)


def test_two_engines_share_a_card() -> None:
    """The second sees what the first left, and takes no more than its own part."""
    first = CardMemory(80 * GIB, free_bytes=79 * GIB, own_bytes=1 * GIB)
    half = config(gpu_memory_fraction=0.5)
    assert left_bytes(half, first) == 39 * GIB
    second = CardMemory(80 * GIB, free_bytes=39 * GIB, own_bytes=1 * GIB)
    assert left_bytes(half, second) == 39 * GIB
    crowded = CardMemory(80 * GIB, free_bytes=20 * GIB, own_bytes=1 * GIB)
    assert left_bytes(half, crowded) == 20 * GIB


def test_bytes_win_over_the_fraction() -> None:
    card = CardMemory(80 * GIB, free_bytes=79 * GIB, own_bytes=1 * GIB)
    assert left_bytes(config(gpu_memory_bytes=10 * GIB), card) == 9 * GIB


def test_weights_that_do_not_fit_are_refused_by_how_much() -> None:
    card = CardMemory(24 * GIB, free_bytes=23 * GIB, own_bytes=1 * GIB)
    check_weights_fit(20 * GIB, config(), card)
    with pytest.raises(NotEnoughMemory, match=r"take 30.00 GiB, 9.40 GiB more .* 24.00 GiB"):
        check_weights_fit(30 * GIB, config(), card)


def test_the_cache_gets_what_weights_and_steps_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    card = CardMemory(80 * GIB, free_bytes=60 * GIB, own_bytes=20 * GIB)
    monkeypatch.setattr(memory, "card_memory", lambda device: card)
    model = read_model_config(DEMO)
    few, many = config(max_num_seqs=64), config(max_num_seqs=512)
    budget = memory.cache_budget(few, model, CUDA, working_bytes=3 * GIB)
    assert budget == 49 * GIB - later_bytes(few, model)
    assert memory.cache_budget(many, model, CUDA, working_bytes=3 * GIB) < budget
    assert memory.cache_budget(few, model, CUDA, working_bytes=60 * GIB) == 0


def test_a_cache_that_does_not_fit_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    card = CardMemory(80 * GIB, free_bytes=0, own_bytes=20 * GIB)
    monkeypatch.setattr(memory, "card_memory", lambda device: card)
    model = read_model_config(DEMO)
    with pytest.raises(NotEnoughMemory, match=r"needs (\d+) bytes .* for 0: \1 are missing"):
        plan_kv_cache(config(max_model_len=64), model, CUDA, torch.bfloat16)
