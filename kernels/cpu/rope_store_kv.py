"""rope_store_kv for CPUs. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import struct

import torch

from . import native
from .tensors import DTYPE_CODES, has_heads, is_cache, is_vector, supported

__all__ = ["accepts", "rope_store_kv", "supported"]

_ARGUMENTS = struct.Struct("6P2P6q3q3q")
"""RopeStoreArgs in src/level.h, the cache in its middle."""


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
    if not (has_heads(q) and has_heads(k) and has_heads(v)):
        return False
    dtype, (num_rows, _, dim), rows_shape = q.dtype, q.shape, k.shape
    return (
        k.dtype is v.dtype is dtype
        and rows_shape == v.shape == (num_rows, k_cache.shape[2], dim)
        and is_cache(k_cache, dim, dtype)
        and is_cache(v_cache, dim, dtype)
        and v_cache.shape == k_cache.shape
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
    num_rows, num_heads, _ = q.shape
    rows = q.data_ptr(), k.data_ptr(), v.data_ptr()
    tables = cos_sin.data_ptr(), positions.data_ptr(), slot_mapping.data_ptr()
    caches = k_cache.data_ptr(), v_cache.data_ptr(), *k_cache.shape
    strides = k_cache.stride()[0], v_cache.stride()[0]
    sizes = num_rows, num_heads, cos_sin.shape[0], q.stride()[0], k.stride()[0], v.stride()[0]
    arguments = _ARGUMENTS.pack(*rows, *tables, *caches, *strides, *sizes)
    native.call("rope_store_kv", DTYPE_CODES[q.dtype], arguments)
