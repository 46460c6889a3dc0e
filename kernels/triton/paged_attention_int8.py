"""paged_attention_int8 in Triton: paged_attention's kernel, scores and weights times their scales.

Knows no model; kernels/reference says what it computes.
"""

from __future__ import annotations

import torch

from .paged_attention import attend
from .tensors import has_heads, is_cache, supported

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
    are_caches = all(is_cache(cache, q.shape[2], torch.int8) for cache in (k_cache, v_cache))
    are_scales = all(scales[0].is_contiguous() for scales in (k_scales, v_scales))
    return has_heads(q) and are_caches and are_scales and q.shape[1] % k_cache.shape[2] == 0


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
    lists = block_tables, query_start, context_lens
    return attend(q, k_cache, v_cache, (k_scales, v_scales), lists, scale, sliding_window)
