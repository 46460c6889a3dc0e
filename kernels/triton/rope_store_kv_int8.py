"""rope_store_kv_int8 in Triton: one program a row and head; a head's largest number is its scale.

Knows no model; kernels/reference says what it computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tensors import has_heads, is_cache, supported

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
    return (
        all(has_heads(x) and x.dtype is q.dtype for x in (q, k, v))
        and q.shape[2] % 2 == 0
        and all(is_cache(cache, q.shape[2], torch.int8) for cache in (k_cache, v_cache))
        and all(scales[0].is_contiguous() for scales in (k_scales, v_scales))
        and cos_sin.is_contiguous()
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
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if num_rows:
        _rope_store_kv_int8[(num_rows, num_heads + num_kv_heads)](
            q, k, v, cos_sin, positions, k_cache, v_cache, k_scales, v_scales, slot_mapping,
            q.stride(0), k.stride(0), v.stride(0), k_cache.stride(0), v_cache.stride(0),
            k_scales.stride(0), v_scales.stride(0),
            num_heads, num_kv_heads, k_cache.shape[1], head_dim,
            WIDTH=triton.next_power_of_2(head_dim // 2),
        )  # fmt: skip


@triton.jit
def _rope_store_kv_int8(
    q, k, v, cos_sin, positions, k_cache, v_cache, k_scales, v_scales, slot_mapping,
    q_stride, k_stride, v_stride, k_block_stride, v_block_stride, k_scale_stride, v_scale_stride,
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
        at = q + row * q_stride + head * head_dim + places
        first, second = _rotated(at, cos, sin, half, inside)
        tl.store(at, first.to(q.dtype.element_ty), mask=inside)
        tl.store(at + half, second.to(q.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slot_mapping + row).to(tl.int64)
        if slot >= 0:
            kv_head = head - num_heads
            block, offset = slot // block_size, slot % block_size
            cell = offset * num_kv_heads + kv_head
            at = k + row * k_stride + kv_head * head_dim + places
            first, second = _rotated(at, cos, sin, half, inside)
            to = k_cache + block * k_block_stride + cell * head_dim + places
            _store(to, k_scales + block * k_scale_stride + cell, first, second, half, inside)
            at = v + row * v_stride + kv_head * head_dim + places
            first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
            to = v_cache + block * v_block_stride + cell * head_dim + places
            _store(to, v_scales + block * v_scale_stride + cell, first, second, half, inside)


@triton.jit
def _rotated(at, cos, sin, half, inside):
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _store(at, scale_at, first, second, half, inside):
    """Both halves of a head, by one scale; one that is not finite gets zeros and a scale of NaN."""
    largest = tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(second), 0))
    num_nan = tl.sum((first != first).to(tl.int32), 0) + tl.sum((second != second).to(tl.int32), 0)
    scale = tl.where((num_nan > 0) | (largest == float("inf")), float("nan"), largest / 127.0)
    tl.store(scale_at, scale)
    tl.store(at, _rounded(first, scale), mask=inside)
    tl.store(at + half, _rounded(second, scale), mask=inside)


@triton.jit
def _rounded(x, scale):
    """To the nearest integer, the even one of two: what the sum with 1.5 * 2^23 leaves of it."""
    ratio = tl.where(scale > 0.0, x / scale, 0.0)
    return ((ratio + 12582912.0) - 12582912.0).to(tl.int8)
