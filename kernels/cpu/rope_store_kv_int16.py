"""rope_store_kv_int16 for CPUs. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import torch

from .rope_store_kv import accepts_rows, rotate_and_store
from .tensors import are_panels, panel_fields, supported

__all__ = ["accepts", "rope_store_kv_int16", "supported"]


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
    return (
        q.dtype is torch.bfloat16
        and accepts_rows(q, k, v, cos_sin, positions, k_cache.shape[2], slot_mapping)
        and are_panels(k_cache, v_cache, k_scales, v_scales, q.shape[-1])
    )


def rope_store_kv_int16(
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
    cache = panel_fields(k_cache, v_cache, k_scales, v_scales)
    rotate_and_store("rope_store_kv_int16", q, k, v, cos_sin, positions, cache, slot_mapping)
