"""rope_store_kv in Triton: one program a row and head, of queries and then of keys and values.

Knows no model; kernels/reference says what it computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tensors import has_heads, is_float_cache, supported

__all__ = ["accepts", "rope_store_kv", "supported"]


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
    return (
        all(has_heads(x) and x.dtype is q.dtype for x in (q, k, v))
        and q.shape[2] % 2 == 0
        and all(is_float_cache(cache, q.shape[2], q.dtype) for cache in (k_cache, v_cache))
        and cos_sin.is_contiguous()
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
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if num_rows:
        _rope_store_kv[(num_rows, num_heads + num_kv_heads)](
            q, k, v, cos_sin, positions, k_cache, v_cache, slot_mapping,
            q.stride(0), k.stride(0), v.stride(0), k_cache.stride(0), v_cache.stride(0),
            num_heads, num_kv_heads, k_cache.shape[1], head_dim,
            WIDTH=triton.next_power_of_2(head_dim // 2),
        )  # fmt: skip


@triton.jit
def _rope_store_kv(
    q, k, v, cos_sin, positions, k_cache, v_cache, slot_mapping,
    q_stride, k_stride, v_stride, k_block_stride, v_block_stride,
    num_heads, num_kv_heads, block_size, head_dim,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = head_dim // 2
    places = tl.arange(0, WIDTH)
    inside = places < half
    angles = cos_sin + tl.load(positions + row).to(tl.int64) * head_dim
    cos = tl.load(angles + places, mask=inside, other=0.0)
    sin = tl.load(angles + half + places, mask=inside, other=0.0)
    if head < num_heads:
        _rotate(q + row * q_stride + head * head_dim, q + row * q_stride + head * head_dim,
                cos, sin, half, places, inside)  # fmt: skip
    else:
        slot = tl.load(slot_mapping + row).to(tl.int64)
        if slot >= 0:
            kv_head = head - num_heads
            block, offset = slot // block_size, slot % block_size
            within = (offset * num_kv_heads + kv_head) * head_dim
            _rotate(k + row * k_stride + kv_head * head_dim,
                    k_cache + block * k_block_stride + within,
                    cos, sin, half, places, inside)  # fmt: skip
            source = v + row * v_stride + kv_head * head_dim + places
            target = v_cache + block * v_block_stride + within + places
            _store(target, tl.load(source, mask=inside, other=0.0), inside)
            _store(target + half, tl.load(source + half, mask=inside, other=0.0), inside)


@triton.jit
def _rotate(source, target, cos, sin, half, places, inside):
    first = tl.load(source + places, mask=inside, other=0.0)
    second = tl.load(source + half + places, mask=inside, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    _store(target + places, (a * cos - b * sin).to(first.dtype), inside)
    _store(target + half + places, (b * cos + a * sin).to(first.dtype), inside)


@triton.jit
def _store(target, x, inside):
    """In fp8 the largest number stands for what is larger; NaN stays NaN."""
    if target.dtype.element_ty == tl.float8e4nv:
        x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
    tl.store(target, x.to(target.dtype.element_ty), mask=inside)
