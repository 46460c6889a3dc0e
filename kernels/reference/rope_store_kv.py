"""rope_store_kv: rotary positions, then the step's keys and values into the paged cache.

Knows no model: how the table of cosines comes about (base, scaling) is the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .case import Builder, Case, Cost, Inputs, num_bytes

FP8_LARGEST = 448.0


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
    """Rotate `q` in place; write rotated `k`, and `v`, to the cache. `k` and `v` stay as they are.

    q: [T, Hq, D]; k, v: [T, Hk, D]: views with a contiguous last dimension, of one dtype.
    cos_sin: [max_pos, D] fp32: cosines of D/2 angles, then their sines. positions: [T] int32.
    k_cache, v_cache: [num_blocks, block_size, Hk, D] of that dtype, or float8_e4m3fn, whose range
    larger numbers are cut to. slot_mapping: [T] int32, block * block_size +
    offset, or -1 for a row that must not be stored; no two rows share a slot.
    The rotation pairs element i with i + D/2 (the "half" style of transformers), in fp32.
    Source: arXiv:2104.09864.
    """
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    block_size = k_cache.shape[1]
    rows = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[rows].long()
    where = (slots // block_size, slots % block_size)
    for cache, x in ((k_cache, rotated(k, cos, sin)), (v_cache, v)):
        as_indexed(cache).index_put_(where, as_indexed(stored(x[rows], cache.dtype)))
    q.copy_(rotated(q, cos, sin))


def stored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As a cache of `dtype` holds it; NaN stays NaN."""
    if dtype is torch.float8_e4m3fn:
        x = x.clamp(-FP8_LARGEST, FP8_LARGEST)
    return x.to(dtype)


def as_indexed(x: torch.Tensor) -> torch.Tensor:
    """Bytes where torch can index no such numbers."""
    return x.view(torch.uint8) if x.dtype is torch.float8_e4m3fn else x


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


def cost(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> Cost:
    rows_bytes = 2 * num_bytes(q, k, v) + q.shape[0] * cos_sin.shape[1] * 4
    return Cost(rows_bytes, 3 * (q.numel() + k.numel()))


def cases() -> Iterator[Case]:
    for num_rows in (1, 8, 32, 64):
        build = qkv_view(num_rows, 14, 2, 64)
        yield Case(f"qwen2-0.5b-{num_rows}-rows", build, is_timed=True)
    yield Case("separate-tensors", _separate)
    yield Case("one-head-odd-half", qkv_view(5, 1, 1, 6))
    yield Case("no-gqa", qkv_view(7, 4, 4, 32))
    yield Case("head-of-80", qkv_view(3, 4, 2, 80))
    yield Case("no-rows", qkv_view(0, 4, 2, 16))
    yield Case("all-padded", qkv_view(4, 4, 2, 16, num_padded=4))
    yield Case("some-padded", qkv_view(9, 4, 2, 16, num_padded=3))
    yield Case("one-layer-of-a-strided-cache", _strided_cache)


def _table(inputs: Inputs, head_dim: int, max_positions: int = 512) -> torch.Tensor:
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float64), frequency)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float().to(inputs.device)


def _rest(
    inputs: Inputs, num_rows: int, num_kv_heads: int, head_dim: int, num_padded: int
) -> tuple[object, ...]:
    num_blocks, block_size = num_rows // 16 + 3, 16
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    slots = inputs.permutation(num_blocks * block_size)[:num_rows].clone()
    slots[num_rows - num_padded :] = -1
    positions = inputs.integers(512, num_rows)
    caches = inputs.normal(*shape), inputs.normal(*shape)
    return _table(inputs, head_dim), positions, *caches, slots


def qkv_view(
    num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, num_padded: int = 0
) -> Builder:
    def build(inputs: Inputs) -> tuple[object, ...]:
        heads = inputs.normal(num_rows, num_heads + 2 * num_kv_heads, head_dim)
        q, k, v = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), dim=1)
        return q, k, v, *_rest(inputs, num_rows, num_kv_heads, head_dim, num_padded)

    return build


def _separate(inputs: Inputs) -> tuple[object, ...]:
    q, k, v = inputs.normal(6, 8, 64), inputs.normal(6, 2, 64), inputs.normal(6, 2, 64)
    q[0, 0, 3] = 1000.0
    return q, k, v, *_rest(inputs, 6, 2, 64, 1)


def _strided_cache(inputs: Inputs) -> tuple[object, ...]:
    q, k, v, table, positions, _, _, slots = qkv_view(6, 4, 2, 32)(inputs)
    cache = inputs.normal(3, 2, 16, 2, 32)
    return q, k, v, table, positions, cache[:, 0], cache[:, 1], slots
