"""paged_attention by the flash-attn kernels inside torch: nothing has to be installed for them.

They read blocks of 256 tokens and multiples in place, if torch lets them be told of blocks (2.12
and later). Of other blocks, prompts' keys and values are first laid side by side: that reads and
writes what attention reads many times. Knows no model; kernels/reference says what it computes.
"""

from __future__ import annotations

from functools import cache

import torch

from ..flash.paged_attention import card, without_padding
from ..flash.versions import Batch, takes

__all__ = ["accepts", "paged_attention", "suits", "supported"]

BLOCK_UNIT = 256
MAX_HEAD_DIM = 256
MIN_CARD = 8
MAX_GATHERED_TOKENS = 32768
"""More are not laid side by side: the memory for it is set aside for good."""


@cache
def takes_blocks() -> bool:
    return "block_table" in _argument_names()


def _argument_names() -> list[str]:
    schema = torch.ops.aten._flash_attention_forward.default._schema
    return [argument.name for argument in schema.arguments]


def supported(device: torch.device, dtype: torch.dtype) -> bool:
    is_known = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and is_known and torch.backends.cuda.is_flash_attention_available()


def suits(device: torch.device, is_decode: bool, block_size: int) -> bool:
    return card(device) >= MIN_CARD and (not is_decode or _reads(block_size))


def _reads(block_size: int) -> bool:
    return takes_blocks() and block_size % BLOCK_UNIT == 0


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
    block_size = k_cache.shape[1]
    num_gathered = 0 if _reads(block_size) else block_tables.numel() * block_size
    return (
        len(context_lens) > 0
        and suits(q.device, len(q) == len(context_lens), block_size)
        and num_gathered <= MAX_GATHERED_TOKENS
        and takes(q, k_cache, v_cache, MAX_HEAD_DIM)
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
    most_keys = block_tables.shape[1] * k_cache.shape[1]
    most_queries = 1 if len(q) == len(context_lens) else len(q)
    batch = Batch(block_tables, query_start, context_lens, most_queries, most_keys)
    if _reads(k_cache.shape[1]):
        out = _attend(q, k_cache, v_cache, batch.key_start(), batch, scale, sliding_window, True)
    else:
        keys, values = (cache[block_tables.flatten()].flatten(0, 1) for cache in (k_cache, v_cache))
        start = torch.arange(len(query_start), dtype=torch.int32, device=q.device) * most_keys
        out = _attend(q, keys, values, start, batch, scale, sliding_window, False)
    return without_padding(out, query_start)


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_start: torch.Tensor,
    batch: Batch,
    scale: float,
    sliding_window: int,
    in_blocks: bool,
) -> torch.Tensor:
    window = {"window_size_left": sliding_window - 1, "window_size_right": 0}
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q, keys, values, batch.query_start, key_start, batch.most_queries, batch.most_keys,
        0.0, True, False, scale=scale, seqused_k=batch.context_lens,
        **(window if sliding_window else {}),
        **({"block_table": batch.block_tables} if in_blocks else {}),
    )[0]  # fmt: skip
    return out
