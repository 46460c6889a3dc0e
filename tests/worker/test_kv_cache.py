"""How many blocks fit, and that what is allocated is what was planned."""

from __future__ import annotations

from pathlib import Path

import pilotlight
import pytest
import torch
from msgspec.structs import replace
from pilotlight.engine.config import EngineConfig
from pilotlight.engine.models.config import read_model_config
from pilotlight.engine.worker.kv_cache import allocate, cache_dtype, plan_kv_cache
from pilotlight.kernels.layout_names import PANEL16, PANEL16_INT12, PLAIN

DEMO = Path(pilotlight.__file__).parent / "demo" / "model"
CPU = torch.device("cpu")


def config(kv_cache_dtype: str) -> EngineConfig:
    return EngineConfig(model=str(DEMO), kv_cache_bytes=4 << 20, kv_cache_dtype=kv_cache_dtype)


def dtype_for(kv_cache_dtype: str, layout: str = PLAIN, block_size: int = 16) -> torch.dtype:
    settings = replace(config(kv_cache_dtype), block_size=block_size)
    return cache_dtype(settings, read_model_config(DEMO), torch.bfloat16, layout)


@pytest.mark.parametrize(
    ("kv_cache_dtype", "layout"), (("auto", PLAIN), ("int8", PLAIN), ("auto", PANEL16_INT12))
)
def test_what_is_allocated_is_what_was_planned(kv_cache_dtype: str, layout: str) -> None:
    model, dtype = read_model_config(DEMO), dtype_for(kv_cache_dtype, layout)
    plan = plan_kv_cache(config(kv_cache_dtype), model, CPU, dtype)
    layers = allocate(plan, model, CPU, dtype)
    tensors = [t for layer in layers for t in (layer.k, layer.v, *(layer.scales or ()))]
    assert sum(t.nbytes for t in tensors) == plan.num_bytes <= 4 << 20
    assert {t.shape[0] for t in tensors} == {plan.num_blocks}
    assert {t.count_nonzero().item() for t in tensors} == {0}


def test_integers_where_weights_are_such_integers_and_heads_and_blocks_fit() -> None:
    assert dtype_for("auto", PANEL16_INT12) is torch.int16
    assert dtype_for("auto", PANEL16) is dtype_for("plain", PANEL16_INT12) is torch.bfloat16
    assert dtype_for("auto", PANEL16_INT12, block_size=8) is torch.bfloat16
    assert dtype_for("int8", PANEL16_INT12) is torch.int8


def test_int8_holds_more_tokens_in_the_same_memory() -> None:
    model = read_model_config(DEMO)
    blocks = {
        name: plan_kv_cache(config(name), model, CPU, dtype_for(name)) for name in ("auto", "int8")
    }
    head = model.head_dim
    ratio = blocks["int8"].num_blocks / blocks["auto"].num_blocks
    assert ratio == pytest.approx(2 * head / (head + 4), rel=0.02)
