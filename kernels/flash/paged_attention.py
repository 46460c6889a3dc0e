"""paged_attention by flash-attn: version 3 (`flash_attn_interface`), else 2 (`flash_attn`).

One call for prompts and decodes: sequences of any length side by side, over the cache's blocks.
Lengths stay on the device; where a call wants to know the longest, it is told a bound. Version 2
reads blocks of 256 tokens and multiples of that only. Knows no model; kernels/reference says what
it computes. Source of the calls: Dao-AILab/flash-attention, hopper/ and flash_attn/.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

__all__ = ["accepts", "paged_attention", "supported"]

VERSION_3, VERSION_2 = "flash_attn_interface", "flash_attn"
BLOCK_UNIT = 256
"""Of version 2."""
MAX_HEAD_DIM = 256


@cache
def installed() -> str:
    """The module that is asked; empty: none. Looked for once, not at every step."""
    names = (name for name in (VERSION_3, VERSION_2) if find_spec(name) is not None)
    return next(names, "")


def supported(device: torch.device, dtype: torch.dtype) -> bool:
    is_known = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and is_known and bool(installed())


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
    head_dim, block_size = q.shape[2], k_cache.shape[1]
    has_blocks = installed() == VERSION_3 or block_size % BLOCK_UNIT == 0
    return (
        has_blocks
        and len(q) > 0
        and len(context_lens) > 0
        and head_dim % 8 == 0
        and head_dim <= MAX_HEAD_DIM
        and k_cache.dtype is v_cache.dtype is q.dtype
        and q.shape[1] % k_cache.shape[2] == 0
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
    num_tokens, num_seqs = len(q), len(context_lens)
    lists = block_tables, query_start, context_lens
    # As many tokens as sequences are one each, for all that this engine computes.
    longest = 1 if num_tokens == num_seqs else num_tokens
    window = (sliding_window - 1, 0) if sliding_window else (-1, -1)
    attend = _version_3 if installed() == VERSION_3 else _version_2
    out = attend(q, k_cache, v_cache, lists, longest, scale, window)
    rows = torch.arange(num_tokens, device=q.device)
    is_padding = (rows >= query_start[-1])[:, None]
    return out.flatten(1).masked_fill(is_padding, 0.0)


Lists = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _version_3(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lists: Lists,
    longest: int,
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    block_tables, query_start, context_lens = lists
    out: torch.Tensor = import_module(VERSION_3).flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=context_lens, page_table=block_tables,
        cu_seqlens_q=query_start, max_seqlen_q=longest, softmax_scale=scale, causal=True,
        window_size=window,
    )  # fmt: skip
    return out


def _version_2(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lists: Lists,
    longest: int,
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    block_tables, query_start, context_lens = lists
    key_start = torch.zeros_like(query_start)
    torch.cumsum(context_lens, 0, out=key_start[1:])
    out: torch.Tensor = import_module(VERSION_2).flash_attn_varlen_func(
        q, k_cache, v_cache, query_start, key_start, longest,
        block_tables.shape[1] * k_cache.shape[1], softmax_scale=scale, causal=True,
        window_size=window, block_table=block_tables,
    )  # fmt: skip
    return out
