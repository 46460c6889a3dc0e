"""paged_attention for CPUs. Knows no model; kernels/reference says what it computes."""

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

__all__ = ["accepts", "paged_attention", "supported"]

_ARGUMENTS = struct.Struct(f"2P{CACHE_FORMAT}3P7qf")
"""AttentionArgs in src/level.h."""


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
    dim = q.shape[-1]
    return (
        accepts_batch(q, k_cache, block_tables, query_start, context_lens, scale)
        and is_cache(k_cache, dim, q.dtype)
        and is_cache(v_cache, dim, q.dtype)
        and v_cache.shape == k_cache.shape
    )


def accepts_batch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> bool:
    """All but what the cache is made of."""
    if not has_heads(q):
        return False
    (_, num_heads, dim), (num_sequences, _) = q.shape, block_tables.shape
    return (
        dim % 2 == 0
        and scale > 0
        and num_heads % k_cache.shape[2] == 0
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
    cache = cache_fields(k_cache, v_cache)
    batch = block_tables, query_start, context_lens
    return attend("paged_attention", q, cache, *batch, scale, sliding_window)


def attend(
    op: str,
    q: torch.Tensor,
    cache: tuple[int, ...],
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int,
) -> torch.Tensor:
    """`op` over a cache of these fields."""
    num_rows, num_heads, dim = q.shape
    out = q.new_empty(num_rows, num_heads * dim)
    lists = block_tables.data_ptr(), query_start.data_ptr(), context_lens.data_ptr()
    sizes = num_rows, num_heads, q.stride()[0], *block_tables.shape, block_tables.stride()[0]
    arguments = _ARGUMENTS.pack(
        q.data_ptr(), out.data_ptr(), *cache, *lists, *sizes, sliding_window, scale
    )
    native.call(op, DTYPE_CODES[q.dtype], arguments)
    return out
