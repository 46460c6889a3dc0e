"""A text through the network at once, without scheduler or slots: for what measures a model.

Knows the decoder and its cache; knows no requests and no sampling.
"""

from __future__ import annotations

import torch

from ...kernels.layout_names import PLAIN
from ..config import EngineConfig
from ..models.config import ModelConfig
from ..models.decoder import AttentionBatch, LayerCache
from .kv_cache import KvPlan, allocate, block_bytes, cache_dtype

BLOCK_SIZE = 16
CPU = torch.device("cpu")


def caches_for(
    config: ModelConfig,
    settings: EngineConfig,
    dtype: torch.dtype,
    context_len: int,
    layout: str = PLAIN,
) -> list[LayerCache]:
    """Room for one sequence of `context_len` tokens on the processor; `layout`: of the weights."""
    dtype = cache_dtype(settings, config, dtype, layout)
    num_blocks = -(-context_len // BLOCK_SIZE)
    one_block = block_bytes(config, BLOCK_SIZE, dtype)
    return allocate(KvPlan(num_blocks, BLOCK_SIZE, one_block, context_len), config, CPU, dtype)


def whole_prompt(num_tokens: int) -> AttentionBatch:
    """One sequence, computed at once, its tokens in the cache from its beginning."""
    places = torch.arange(num_tokens, dtype=torch.int32)
    return AttentionBatch(
        positions=places,
        slot_mapping=places,
        block_tables=torch.arange(-(-num_tokens // BLOCK_SIZE), dtype=torch.int32)[None],
        query_start=torch.tensor([0, num_tokens], dtype=torch.int32),
        context_lens=torch.tensor([num_tokens], dtype=torch.int32),
    )
