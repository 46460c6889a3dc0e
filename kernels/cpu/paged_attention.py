"""paged_attention for CPUs. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import struct

import torch

from . import native
from .tensors import DTYPE_CODES, has_heads, is_cache, is_vector, supported

__all__ = ["accepts", "paged_attention", "supported"]

_ARGUMENTS = struct.Struct("2P2P6q3P7qf")
"""AttentionArgs in src/level.h, the cache after the first two."""


def accepts(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int,
) -> bool:
    if not has_heads(q):
        return False
    dtype, (_, num_heads, dim), (num_sequences, _) = q.dtype, q.shape, block_tables.shape
    return (
        dim % 2 == 0
        and scale > 0
        and num_heads % k_cache.shape[2] == 0
        and is_cache(k_cache, dim, dtype)
        and is_cache(v_cache, dim, dtype)
        and v_cache.shape == k_cache.shape
        and block_tables.dtype is torch.int32
        and block_tables.stride()[1] == 1
        and is_vector(query_start, num_sequences + 1, torch.int32)
        and is_vector(context_lens, num_sequences, torch.int32)
    )


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int,
) -> torch.Tensor:
    num_rows, num_heads, dim = q.shape
    out = q.new_empty(num_rows, num_heads * dim)
    caches = k_cache.data_ptr(), v_cache.data_ptr(), *k_cache.shape
    strides = k_cache.stride()[0], v_cache.stride()[0]
    lists = block_tables.data_ptr(), query_start.data_ptr(), context_lens.data_ptr()
    sizes = num_rows, num_heads, q.stride()[0], *block_tables.shape, block_tables.stride()[0]
    arguments = _ARGUMENTS.pack(
        q.data_ptr(), out.data_ptr(), *caches, *strides, *lists, *sizes, sliding_window, scale
    )
    native.call("paged_attention", DTYPE_CODES[q.dtype], arguments)
    return out
