"""How many blocks fit, and that what is allocated is what was planned."""

from __future__ import annotations

from pathlib import Path

import pilotlight
import pytest
import torch
from pilotlight.engine.config import EngineConfig
from pilotlight.engine.models.config import read_model_config
from pilotlight.engine.worker.kv_cache import allocate, cache_dtype, plan_kv_cache

DEMO = Path(pilotlight.__file__).parent / "demo" / "model"
CPU = torch.device("cpu")


def config(kv_cache_dtype: str) -> EngineConfig:
    return EngineConfig(model=str(DEMO), kv_cache_bytes=4 << 20, kv_cache_dtype=kv_cache_dtype)


@pytest.mark.parametrize("kv_cache_dtype", ("auto", "int8"))
def test_what_is_allocated_is_what_was_planned(kv_cache_dtype: str) -> None:
    model, dtype = read_model_config(DEMO), cache_dtype(config(kv_cache_dtype), torch.bfloat16)
    plan = plan_kv_cache(config(kv_cache_dtype), model, CPU, dtype)
    layers = allocate(plan, model, CPU, dtype)
    tensors = [t for layer in layers for t in (layer.k, layer.v, *(layer.scales or ()))]
    assert sum(t.nbytes for t in tensors) == plan.num_bytes <= 4 << 20
    assert all(t.shape[:2] == (plan.num_blocks, plan.block_size) for t in tensors)
    assert {t.count_nonzero().item() for t in tensors} == {0}


def test_int8_holds_more_tokens_in_the_same_memory() -> None:
    model = read_model_config(DEMO)
    blocks = {
        name: plan_kv_cache(config(name), model, CPU, cache_dtype(config(name), torch.bfloat16))
        for name in ("auto", "int8")
    }
    head = model.head_dim
    ratio = blocks["int8"].num_blocks / blocks["auto"].num_blocks
    assert ratio == pytest.approx(2 * head / (head + 4), rel=0.02)
