"""rope_store_kv_int8 for CPUs. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import torch

from .rope_store_kv import accepts_rows, rotate_and_store
from .tensors import cache_fields, has_scales, is_cache, supported

__all__ = ["accepts", "rope_store_kv_int8", "supported"]


def accepts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> bool:
    dim = q.shape[-1]
    return (
        accepts_rows(q, k, v, cos_sin, positions, k_cache.shape[2], slot_mapping)
        and is_cache(k_cache, dim, torch.int8)
        and is_cache(v_cache, dim, torch.int8)
        and v_cache.shape == k_cache.shape
        and has_scales(k_cache, k_scales)
        and has_scales(v_cache, v_scales)
    )


def rope_store_kv_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    cache = cache_fields(k_cache, v_cache, (k_scales, v_scales))
    rotate_and_store("rope_store_kv_int8", q, k, v, cos_sin, positions, cache, slot_mapping)
