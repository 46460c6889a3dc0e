"""rope_store_kv_int16: rope_store_kv into a cache of 16-bit integers, as panels.

Knows no model. The integers hold more of a head than bfloat16 does, and their products are quicker
on processors that do not multiply bfloat16; cache_panels.py says how they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from .. import cache_panels
from . import rope_store_kv as plain
from . import rope_store_kv_int8 as of_bytes
from .case import Builder, Case, Cost, Inputs, as_cached


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
    """Rotate `q` in place; write rotated `k`, and `v`, as integers, to the cache.

    As rope_store_kv, but k_cache, v_cache, int16, and k_scales, v_scales, fp32, are panels. A head
    of a token becomes round(x / scale), scale = max |x| / 8191: `k` from its rotation in fp32,
    without a rounding between. A head that is not finite gets a scale of NaN.
    """
    block_size = k_cache.shape[1] * cache_panels.TOKENS
    rows = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[rows].long()
    blocks, tokens = slots // block_size, slots % block_size
    panels, places = tokens // cache_panels.TOKENS, tokens % cache_panels.TOKENS
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    keys, k_scales[blocks, panels, :, places] = cache_panels.integers(
        plain.rotated(k.float(), cos, sin)[rows]
    )
    values, v_scales[blocks, panels, :, places] = cache_panels.integers(v[rows])
    k_cache[blocks, panels, :, :, places] = keys.unflatten(2, (-1, 2))
    v_cache[blocks, panels, :, :, places // 2, :, places % 2] = values.unflatten(2, (-1, 16))
    q.copy_(plain.rotated(q, cos, sin))


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
    scales_bytes = 2 * 4 * k.shape[0] * k.shape[1]
    return Cost(whole.num_bytes + scales_bytes, whole.num_flops + 3 * 2 * k.numel())


def cases() -> Iterator[Case]:
    """Those of rope_store_kv_int8 whose heads make panels."""
    for case in of_bytes.plain_cases():
        if case.name != "one-head-odd-half":
            yield replace(case, build=_as_panels(case.build), dtypes=(torch.bfloat16,))


def _as_panels(build: Builder) -> Builder:
    def built(inputs: Inputs) -> tuple[object, ...]:
        *rows, k_cache, v_cache, slots = build(inputs)
        assert isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor)
        return *rows, *panels(k_cache, v_cache), slots

    return built


def panels(
    k_cache: torch.Tensor, v_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Caches [num_blocks, block_size, Hk, D] as keys, values and the scales of both."""
    (k, k_scales), (v, v_scales) = (cache_panels.integers(cache) for cache in (k_cache, v_cache))
    return (
        as_cached(cache_panels.key_panels(k)),
        as_cached(cache_panels.value_panels(v)),
        as_cached(cache_panels.scale_panels(k_scales)),
        as_cached(cache_panels.scale_panels(v_scales)),
    )
