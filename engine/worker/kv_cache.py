"""The tensors behind the blocks, and how many blocks this machine can hold. Knows no sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels import cache_panels, large_pages
from ...kernels.layout_names import PANEL16_INT12
from ..config import EngineConfig
from ..errors import ConfigError, NotEnoughMemory
from ..last_plan import LastPlan
from ..models.config import ModelConfig
from ..models.decoder import LayerCache
from .memory import cache_budget

SCALE_DTYPE = torch.float32
ASKED_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Those that are not the weights' own."""
SCALED_DTYPES = (torch.int8, torch.int16)


@dataclass(frozen=True, slots=True)
class KvPlan:
    """How much cache there is, and the longest sequence it is promised to hold."""

    num_blocks: int
    block_size: int
    block_bytes: int
    context_len: int

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def cache_dtype(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, layout: str
) -> torch.dtype:
    """Of keys and values, beside weights of `dtype` in `layout`.

    int16, which are panels, where weights are integers too: there they are multiplied faster.
    """
    multiplies_integers = layout == PANEL16_INT12 and dtype is torch.bfloat16
    fits = cache_panels.fits(model.head_dim, config.block_size)
    if config.kv_cache_dtype == "auto" and multiplies_integers and fits:
        return torch.int16
    return ASKED_DTYPES.get(config.kv_cache_dtype, dtype)


def block_bytes(model: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Keys and values of one block in every layer, the scales of integers included."""
    scale_bytes = SCALE_DTYPE.itemsize if dtype in SCALED_DTYPES else 0
    head_bytes = model.head_dim * dtype.itemsize + scale_bytes
    return 2 * model.num_layers * model.num_kv_heads * head_bytes * block_size


def smallest_plan(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> KvPlan:
    """One block, for sequences as long as there may be: nothing can be kept in it."""
    one_block = block_bytes(model, config.block_size, dtype)
    return KvPlan(1, config.block_size, one_block, _wanted_len(config, model))


def plan_kv_cache(
    config: EngineConfig,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    last: LastPlan | None = None,
    working_bytes: int = 0,
) -> KvPlan:
    """Sizes the cache: what was asked for, else what the machine has, never more than is of use.

    A context length that was asked for must fit, or NotEnoughMemory; one chosen here shrinks to
    what fits. The last boot's size is kept where it still fits. `dtype` is the cache's; steps take
    `working_bytes` beside it.
    """
    one_block = block_bytes(model, config.block_size, dtype)
    wanted_len = _wanted_len(config, model)
    useful = config.max_num_seqs * _num_blocks(wanted_len, config.block_size)
    budget = config.kv_cache_bytes or cache_budget(config, model, device, working_bytes)
    fitting = budget // one_block
    if last is not None and last.num_blocks <= min(useful, fitting):
        return KvPlan(last.num_blocks, config.block_size, one_block, last.context_len)
    num_blocks = min(useful, fitting)
    context_len = min(wanted_len, num_blocks * config.block_size)
    is_too_short = context_len < wanted_len and config.max_model_len > 0
    if is_too_short or context_len < 2:
        raise _not_enough(config, wanted_len, one_block, budget)
    return KvPlan(num_blocks, config.block_size, one_block, context_len)


def _wanted_len(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}: this model's positions end at "
            f"{model.max_position_embeddings}"
        )
    return config.max_model_len or model.max_position_embeddings


def _num_blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def _not_enough(
    config: EngineConfig, wanted_len: int, one_block: int, budget: int
) -> NotEnoughMemory:
    needed = _num_blocks(wanted_len, config.block_size) * one_block
    given = "--kv-cache-bytes gives" if config.kv_cache_bytes else "there is room for"
    return NotEnoughMemory(
        f"one sequence of {wanted_len} tokens needs {needed} bytes of KV cache, {given} {budget}: "
        f"{needed - budget} are missing; lower --max-model-len or raise --kv-cache-bytes (of a GPU "
        "--gpu-memory-fraction)"
    )


def allocate(
    plan: KvPlan,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    num_padding_blocks: int = 0,
) -> list[LayerCache]:
    """Zeroed caches, one pair per layer. Zeros, so that no cell ever holds a NaN of old memory.

    Blocks of padding lie behind those that the plan gives to sequences.
    """
    cells = (plan.num_blocks + num_padding_blocks, plan.block_size, model.num_kv_heads)
    if dtype is torch.int16:
        keys, values, scales = cache_panels.shapes(*cells, model.head_dim)
    else:
        keys, values, scales = (*cells, model.head_dim), (*cells, model.head_dim), cells

    def layer() -> LayerCache:
        k, v = _zeros(keys, device, dtype), _zeros(values, device, dtype)
        if dtype not in SCALED_DTYPES:
            return LayerCache(k, v)
        k_scales, v_scales = (_zeros(scales, device, SCALE_DTYPE) for _ in range(2))
        return LayerCache(k, v, (k_scales, v_scales))

    return [layer() for _ in range(model.num_layers)]


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    # Blocks of a cache are read here and there.
    if device.type == "cpu":
        return large_pages.zeros(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)
