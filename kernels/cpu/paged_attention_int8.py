"""paged_attention_int8 for CPUs. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import torch

from .paged_attention import accepts_batch, attend
from .tensors import cache_fields, has_scales, is_cache, supported

__all__ = ["accepts", "paged_attention_int8", "supported"]


def accepts(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int,
) -> bool:
    dim = q.shape[-1]
    return (
        accepts_batch(q, k_cache, block_tables, query_start, context_lens, scale)
        and is_cache(k_cache, dim, torch.int8)
        and is_cache(v_cache, dim, torch.int8)
        and v_cache.shape == k_cache.shape
        and has_scales(k_cache, k_scales)
        and has_scales(v_cache, v_scales)
    )


def paged_attention_int8(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int,
) -> torch.Tensor:
    cache = cache_fields(k_cache, v_cache, (k_scales, v_scales))
    batch = block_tables, query_start, context_lens
    return attend("paged_attention_int8", q, cache, *batch, scale, sliding_window)
