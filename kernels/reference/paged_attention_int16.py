"""paged_attention_int16: paged_attention over a cache of 16-bit integers, as panels.

Knows no model; rope_store_kv_int16 fills such a cache, cache_panels.py says how it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from .. import cache_panels
from . import paged_attention as plain
from .case import Builder, Case, Cost, Inputs, num_bytes
from .rope_store_kv_int16 import panels

OUTLIER = 300.0


def paged_attention_int16(
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

    k_cache, v_cache, int16, and k_scales, v_scales, fp32, are panels; all others, and the result,
    as there.
    """
    block_size = k_cache.shape[1] * cache_panels.TOKENS

    def read(row: int, span: plain.Span) -> tuple[torch.Tensor, torch.Tensor]:
        def part(cache: torch.Tensor, of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
            return plain.gathered(cache, block_tables[row], span, block_size, of)

        k = part(k_cache, cache_panels.keys_of)
        v = part(v_cache, cache_panels.values_of)
        k_factors, v_factors = (part(s, cache_panels.scales_of) for s in (k_scales, v_scales))
        return k * k_factors.unsqueeze(-1), v * v_factors.unsqueeze(-1)

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
    """As a cache of bfloat16: what the scales take beside the integers is this layout's own."""
    key_bytes = 2 * num_bytes(k_cache[0, 0]) // cache_panels.TOKENS
    return plain.attention_cost(q, key_bytes, query_start, context_lens, sliding_window)


def cases() -> Iterator[Case]:
    """Those of paged_attention whose heads and blocks make panels, and numbers far apart."""
    for case in plain.cases():
        batch = case.build
        assert isinstance(batch, plain.Batch)
        if cache_panels.fits(batch.head_dim, batch.block_size):
            yield replace(case, build=_as_panels(batch), dtypes=(torch.bfloat16,))
    mixture = plain.Batch([(1, 70), (33, 90)], head_dim=64)
    for name, change in (("outliers", _with_outliers), ("all-zeros", _with_zeros)):
        build = _as_panels(mixture, change)
        yield Case(name, build, dtypes=(torch.bfloat16,))


def _as_panels(
    build: Builder,
    change: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object] | None = None,
) -> Builder:
    def built(inputs: Inputs) -> tuple[object, ...]:
        q, k_cache, v_cache, *others = build(inputs)
        assert isinstance(q, torch.Tensor)
        assert isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor)
        if change is not None:
            change(q, k_cache, v_cache)
        return q, *panels(k_cache, v_cache), *others

    return built


def _with_outliers(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """An element of all keys, as biases make them, and values of a few tokens."""
    k_cache[..., 5] += OUTLIER
    v_cache[:, 3] *= OUTLIER


def _with_zeros(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    for tensor in (q[:9], k_cache[:, :4], v_cache[:, 2:9]):
        tensor.zero_()
