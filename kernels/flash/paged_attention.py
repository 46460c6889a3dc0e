"""paged_attention by the best version of flash-attn that is installed and suits the card.

One call for prompts and decodes: sequences of any length side by side, over the cache's blocks.
Knows no model; kernels/reference says what it computes.
"""

from __future__ import annotations

from functools import cache

import torch

from .versions import VERSIONS, Batch, Version, takes

__all__ = ["accepts", "paged_attention", "suits", "supported"]


@cache
def installed() -> tuple[Version, ...]:
    """Best first. Looked for once, not at every step."""
    return tuple(version for version in VERSIONS if version.is_installed())


@cache
def card(device: torch.device) -> int:
    """The first number of its compute capability."""
    return torch.cuda.get_device_capability(device)[0]


def supported(device: torch.device, dtype: torch.dtype) -> bool:
    is_known = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and is_known and bool(installed())


def suits(device: torch.device, is_decode: bool, block_size: int) -> bool:
    return _chosen(device, is_decode, block_size) is not None


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
    version = _chosen(q.device, len(q) == len(context_lens), k_cache.shape[1])
    is_taken = version is not None and takes(q, k_cache, v_cache, version.max_head_dim)
    return is_taken and len(context_lens) > 0


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
    num_tokens, block_size = len(q), k_cache.shape[1]
    # As many tokens as sequences are one each, for all that this engine computes.
    is_decode = num_tokens == len(context_lens)
    version = _chosen(q.device, is_decode, block_size)
    assert version is not None, "accepted before"
    most_keys = block_tables.shape[1] * block_size
    most_queries = 1 if is_decode else num_tokens
    batch = Batch(block_tables, query_start, context_lens, most_queries, most_keys)
    out = version(q, k_cache, v_cache, batch, scale, sliding_window)
    return without_padding(out, query_start)


def without_padding(out: torch.Tensor, query_start: torch.Tensor) -> torch.Tensor:
    """[num_tokens, heads * dim]: zeros behind the last sequence, where nothing was written."""
    rows = torch.arange(len(out), device=out.device)
    is_padding = (rows >= query_start[-1])[:, None]
    return out.flatten(1).masked_fill(is_padding, 0.0)


@cache
def _chosen(device: torch.device, is_decode: bool, block_size: int) -> Version | None:
    suiting = (v for v in installed() if v.suits(card(device), is_decode, block_size))
    return next(suiting, None)
