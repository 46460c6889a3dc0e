"""rope_store_kv for CPUs. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import struct

import torch

from . import native
from .tensors import (
    CACHE_FORMAT,
    DTYPE_CODES,
    cache_fields,
    has_heads,
    is_cache,
    is_vector,
    supported,
)

__all__ = ["accepts", "rope_store_kv", "supported"]

_ARGUMENTS = struct.Struct(f"6P{CACHE_FORMAT}3q3q")
"""RopeStoreArgs in src/level.h."""


def accepts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> bool:
    dim = q.shape[-1]
    return (
        accepts_rows(q, k, v, cos_sin, positions, k_cache.shape[2], slot_mapping)
        and is_cache(k_cache, dim, q.dtype)
        and is_cache(v_cache, dim, q.dtype)
        and v_cache.shape == k_cache.shape
    )


def accepts_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    num_kv_heads: int,
    slot_mapping: torch.Tensor,
) -> bool:
    """All but what the cache is made of."""
    if not (has_heads(q) and has_heads(k) and has_heads(v)):
        return False
    num_rows, _, dim = q.shape
    return (
        k.dtype is v.dtype is q.dtype
        and k.shape == v.shape == (num_rows, num_kv_heads, dim)
        and cos_sin.shape[1] == dim
        and cos_sin.dtype is torch.float32
        and cos_sin.is_contiguous()
        and is_vector(positions, num_rows, torch.int32)
        and is_vector(slot_mapping, num_rows, torch.int32)
    )


def rope_store_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    cache = cache_fields(k_cache, v_cache)
    rotate_and_store("rope_store_kv", q, k, v, cos_sin, positions, cache, slot_mapping)


def rotate_and_store(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    cache: tuple[int, ...],
    slot_mapping: torch.Tensor,
) -> None:
    """`op` into a cache of these fields."""
    num_rows, num_heads, _ = q.shape
    rows = q.data_ptr(), k.data_ptr(), v.data_ptr()
    tables = cos_sin.data_ptr(), positions.data_ptr(), slot_mapping.data_ptr()
    sizes = num_rows, num_heads, cos_sin.shape[0], q.stride()[0], k.stride()[0], v.stride()[0]
    arguments = _ARGUMENTS.pack(*rows, *tables, *cache, *sizes)
    native.call(op, DTYPE_CODES[q.dtype], arguments)
