"""paged_attention_int16 for CPUs. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import torch

from .paged_attention import accepts_batch, attend
from .tensors import are_panels, panel_fields, supported

__all__ = ["accepts", "paged_attention_int16", "supported"]


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
    return (
        q.dtype is torch.bfloat16
        and accepts_batch(q, k_cache, block_tables, query_start, context_lens, scale)
        and are_panels(k_cache, v_cache, k_scales, v_scales, q.shape[-1])
    )


def paged_attention_int16(
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
    cache = panel_fields(k_cache, v_cache, k_scales, v_scales)
    batch = block_tables, query_start, context_lens
    return attend("paged_attention_int16", q, cache, *batch, scale, sliding_window)
