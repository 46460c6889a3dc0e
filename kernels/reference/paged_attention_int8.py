"""paged_attention_int8: paged_attention over a cache of int8, with a scale per token and head.

Knows no model; rope_store_kv_int8 fills such a cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import paged_attention as plain
from .case import Builder, Case, Cost, Inputs, as_cached, num_bytes
from .rope_store_kv_int8 import quantised


def paged_attention_int8(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int,
) -> torch.Tensor:
    """Return paged_attention with keys k_cache * k_scales and values v_cache * v_scales, in fp32.

    k_cache, v_cache: [num_blocks, block_size, Hk, D] int8; k_scales, v_scales: [num_blocks,
    block_size, Hk] fp32; all others, and the result, as there.
    """

    def read(row: int, span: plain.Span) -> tuple[torch.Tensor, torch.Tensor]:
        def values(cache: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
            table = block_tables[row]
            factors = plain.gathered(scales, table, span).unsqueeze(-1)
            return plain.gathered(cache, table, span) * factors

        return values(k_cache, k_scales), values(v_cache, v_scales)

    lists = query_start, context_lens
    return plain.attention_over(q.float(), read, *lists, scale, sliding_window).to(q.dtype)


def cost(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int,
) -> Cost:
    key_bytes = 2 * num_bytes(k_cache[0, 0], k_scales[0, 0])
    return plain.attention_cost(q, key_bytes, query_start, context_lens, sliding_window)


def cases() -> Iterator[Case]:
    """Those of paged_attention, the sharpest less sharp: a scale is another rounding of a score."""
    for case in plain.cases():
        if case.name != "sharp-softmax":
            yield Case(case.name, _quantised_caches(case.build), case.is_timed)
    sharp = plain.Batch([(1, 70), (40, 45)], query_scale=20.0)
    yield Case("sharp-softmax", _quantised_caches(sharp))


def _quantised_caches(build: Builder) -> Builder:
    def built(inputs: Inputs) -> tuple[object, ...]:
        q, k_cache, v_cache, *others = build(inputs)
        assert isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor)
        (k, k_scales), (v, v_scales) = quantised(k_cache), quantised(v_cache)
        return q, *(as_cached(t) for t in (k, v, k_scales, v_scales)), *others

    return built
