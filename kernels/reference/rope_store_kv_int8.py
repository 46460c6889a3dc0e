"""rope_store_kv_int8: rope_store_kv into a cache of int8, with a scale per token and head.

Knows no model. Symmetric: no zero point, so that a scale is a factor of scores and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from . import rope_store_kv as plain
from .case import Builder, Case, Cost, Inputs

LARGEST = 127


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
    """Rotate `q` in place; write rotated `k`, and `v`, quantised, to the cache.

    As rope_store_kv, but k_cache, v_cache are int8 and k_scales, v_scales: [num_blocks, block_size,
    Hk] fp32. A head of a token becomes round(x / scale), scale = max |x| / 127: `k` from its
    rotation in fp32, without a rounding between. A head that is not finite gets a scale of NaN.
    """
    block_size = k_cache.shape[1]
    rows = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[rows].long()
    where = (slots // block_size, slots % block_size)
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    rotated_k = plain.rotated(k.float(), cos, sin)
    for x, cache, scales in ((rotated_k, k_cache, k_scales), (v, v_cache, v_scales)):
        values, factors = quantised(x[rows])
        cache.index_put_(where, values)
        scales.index_put_(where, factors)
    q.copy_(plain.rotated(q, cos, sin))


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., D] -> int8 [..., D] and fp32 scales [...], so that values * scales is about x."""
    x = x.float()
    scales = x.abs().amax(-1) / LARGEST
    scales = torch.where(scales.isinf(), torch.nan, scales)
    ratios = x / scales.unsqueeze(-1)
    return ratios.round().nan_to_num(0.0).to(torch.int8), scales


def cost(
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
) -> Cost:
    whole = plain.cost(q, k, v, cos_sin, positions, k_cache, v_cache, slot_mapping)
    saved = (k.numel() + v.numel()) * (k.element_size() - 1)
    scales_bytes = 2 * 4 * k.shape[0] * k.shape[1]
    return Cost(whole.num_bytes - saved + scales_bytes, whole.num_flops + 3 * 2 * k.numel())


def cases() -> Iterator[Case]:
    for case in plain_cases():
        yield Case(case.name, _quantised_caches(case.build), case.is_timed)


def plain_cases() -> Iterator[Case]:
    """Those of rope_store_kv, and values that are hard to quantise."""
    yield from plain.cases()
    yield Case("all-zeros", _zeros)
    yield Case("outliers", _outliers)


def _quantised_caches(build: Builder) -> Builder:
    def built(inputs: Inputs) -> tuple[object, ...]:
        *rows, k_cache, v_cache, slots = build(inputs)
        assert isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor)
        (k, k_scales), (v, v_scales) = quantised(k_cache), quantised(v_cache)
        return *rows, k, v, k_scales, v_scales, slots

    return built


def _zeros(inputs: Inputs) -> tuple[object, ...]:
    return _rows(inputs, lambda x: x.zero_())


def _outliers(inputs: Inputs) -> tuple[object, ...]:
    return _rows(inputs, lambda x: x[:, :, 3].mul_(1000.0))


def _rows(inputs: Inputs, change: Callable[[torch.Tensor], object]) -> tuple[object, ...]:
    """Five rows, their keys and values changed."""
    q, k, v, *others = plain.qkv_view(5, 4, 2, 32)(inputs)
    assert isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)
    change(k)
    change(v)
    return q, k, v, *others
