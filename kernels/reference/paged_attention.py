"""paged_attention: causal grouped-query attention over a paged cache, prefill and decode in one.

Knows no model and no scheduler: a batch is any mixture of sequences with one or many queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional

from .case import Case, Cost, Inputs, num_bytes
from .rope_store_kv import as_indexed


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
    """Return softmax(scale * q k^T) v for every query over its own sequence: [T, Hq * D].

    q: [T, Hq, D], last dimension contiguous; k_cache, v_cache: [num_blocks, block_size, Hk, D] of
    the same dtype, or float8_e4m3fn, which is computed with as that dtype; query head h reads key
    head h // (Hq / Hk). block_tables: [R, max_blocks] int32. query_start: [R + 1] int32, ascending
    from 0. context_lens: [R] int32, tokens in the cache, this
    step's included. Query i of sequence r is at position
    p = context_lens[r] - (query_start[r + 1] - query_start[r]) + i and sees keys j <= p, and with a
    sliding_window w > 0 only j > p - w. Rows from query_start[R] on are padding: they come back 0.
    """

    def read(row: int, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        table = block_tables[row]
        k, v = (gathered(as_indexed(cache), table, span) for cache in (k_cache, v_cache))
        return k.view(k_cache.dtype).to(q.dtype), v.view(v_cache.dtype).to(q.dtype)

    return attention_over(q, read, query_start, context_lens, scale, sliding_window)


def attention_over(
    q: torch.Tensor,
    read: Callable[[int, Span], tuple[torch.Tensor, torch.Tensor]],
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int,
) -> torch.Tensor:
    """paged_attention over whatever `read(r, span)` gives: keys and values [keys, Hk, D] as q's."""
    out = torch.zeros((q.shape[0], q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
    starts, lengths = query_start.tolist(), context_lens.tolist()
    for r, length in enumerate(lengths):
        begin, end = starts[r], starts[r + 1]
        if begin < end:
            span = Span(length - (end - begin), length, sliding_window)
            heads = _attend(q[begin:end], *read(r, span), span, scale)
            out[begin:end] = heads.flatten(1)
    return out


@dataclass(frozen=True, slots=True)
class Span:
    """Queries at positions [first_query, length) and the keys that any of them sees."""

    first_query: int
    length: int
    sliding_window: int

    @property
    def first_key(self) -> int:
        return max(0, self.first_query - self.sliding_window + 1) if self.sliding_window else 0

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """[queries, keys], True where visible; None when every query sees every key."""
        if self.length - self.first_query == 1:
            return None
        query = torch.arange(self.first_query, self.length, device=device).unsqueeze(1)
        key = torch.arange(self.first_key, self.length, device=device)
        visible = key <= query
        return visible & (key > query - self.sliding_window) if self.sliding_window else visible


def gathered(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    span: Span,
    block_size: int = 0,
    in_order: Callable[[torch.Tensor], torch.Tensor] = lambda blocks: blocks,
) -> torch.Tensor:
    """What the cache holds of the visible keys of one sequence.

    It is [num_blocks, block_size, ...], or `in_order` makes that of blocks of `block_size`.
    """
    block_size = block_size or cache.shape[1]
    first_block = span.first_key // block_size
    blocks = block_table[first_block : -(-span.length // block_size)]
    tokens = in_order(cache[blocks.long()]).flatten(0, 1)
    offset = first_block * block_size
    return tokens[span.first_key - offset : span.length - offset]


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span, scale: float
) -> torch.Tensor:
    """q: [queries, Hq, D]; k, v: [keys, Hk, D] -> [queries, Hq, D]."""
    q, k, v = (heads.transpose(0, 1).unsqueeze(0) for heads in (q, k, v))
    mask = span.mask(q.device)
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.squeeze(0).transpose(0, 1)


def cost(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int,
) -> Cost:
    """Keys and values once per sequence; two products per visible pair of query and key."""
    key_bytes = 2 * num_bytes(k_cache[0, 0])
    return attention_cost(q, key_bytes, query_start, context_lens, sliding_window)


def attention_cost(
    q: torch.Tensor,
    key_bytes: int,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    sliding_window: int,
) -> Cost:
    """`key_bytes`: of a token's keys and values, of all heads."""
    starts, lengths = query_start.tolist(), context_lens.tolist()
    num_keys = num_pairs = 0
    for r, length in enumerate(lengths):
        num_queries = starts[r + 1] - starts[r]
        window = sliding_window or length
        first = length - num_queries
        num_keys += min(length, window + num_queries - 1) if num_queries else 0
        num_pairs += sum(min(p + 1, window) for p in range(first, length))
    return Cost(2 * num_bytes(q) + num_keys * key_bytes, 4 * num_pairs * q.shape[1] * q.shape[2])


@dataclass(frozen=True, slots=True)
class Batch:
    """`sequences` lists (queries, context) per sequence; one builder serves every case."""

    sequences: list[tuple[int, int]]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16
    sliding_window: int = 0
    num_padded: int = 0
    query_scale: float = 1.0
    value_mean: float = 0.0
    """Means of many random values are next to nothing, and so are their errors, but for this."""
    is_strided: bool = False
    is_scattered: bool = True
    """Blocks anywhere; otherwise as an engine gives them out: those of a prompt ascend."""

    def __call__(self, inputs: Inputs) -> tuple[object, ...]:
        num_blocks = [-(-context // self.block_size) for _, context in self.sequences]
        tables = self._tables(inputs, num_blocks)
        cache_shape = (sum(num_blocks) + 2, self.block_size, self.num_kv_heads, self.head_dim)
        k_cache, v_cache = inputs.cache(*cache_shape), inputs.cache(*cache_shape)
        v_cache += self.value_mean
        starts = [0, *accumulate(queries for queries, _ in self.sequences)]
        q = self._queries(inputs, starts[-1] + self.num_padded)
        contexts = inputs.ints([context for _, context in self.sequences])
        lists = tables, inputs.ints(starts), contexts
        return q, k_cache, v_cache, *lists, self.head_dim**-0.5, self.sliding_window

    def _tables(self, inputs: Inputs, num_blocks: list[int]) -> torch.Tensor:
        num_all = sum(num_blocks) + 2
        ascending = inputs.ints(list(range(num_all)))
        block_ids = inputs.permutation(num_all) if self.is_scattered else ascending
        tables = inputs.ints([0]).repeat(len(num_blocks), max(num_blocks, default=0) + 1)
        for r, end in enumerate(accumulate(num_blocks)):
            tables[r, : num_blocks[r]] = block_ids[end - num_blocks[r] : end]
        return tables

    def _queries(self, inputs: Inputs, num_rows: int) -> torch.Tensor:
        num_all = self.num_heads + (2 * self.num_kv_heads if self.is_strided else 0)
        heads = inputs.normal(num_rows, num_all, self.head_dim, scale=self.query_scale)
        return heads[:, : self.num_heads]


QWEN2: dict[str, Any] = {"num_heads": 14, "num_kv_heads": 2, "head_dim": 64, "is_strided": True}

LLAMA: dict[str, Any] = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 64, "is_strided": True}


def cases() -> Iterator[Case]:
    for num_rows in (1, 8, 32, 64):
        decode = Batch([(1, 500 + 3 * i) for i in range(num_rows)], **QWEN2)
        yield Case(f"qwen2-0.5b-decode-{num_rows}-rows-of-500", decode, is_timed=True)
    for length in (128, 512, 2048):
        prefill = Batch([(length, length)], **QWEN2)
        yield Case(f"qwen2-0.5b-prefill-{length}", prefill, is_timed=True)
    long_contexts = [(1, 4096)] * 8
    for model, heads in (("qwen2-0.5b", QWEN2), ("llama-1b", LLAMA)):
        name = f"{model}-decode-8-rows-of-4096"
        scattered = Batch(long_contexts, **heads)
        yield Case(name, replace(scattered, is_scattered=False), is_timed=True)
        yield Case(f"{name}-scattered", scattered, is_timed=True)
    yield Case("one-token", Batch([(1, 1)]))
    yield Case("decode-across-blocks", Batch([(1, n) for n in (1, 15, 16, 17, 63, 64, 65, 129)]))
    yield Case("decode-long", Batch([(1, 1500), (1, 3)], 2, 1, value_mean=10.0))
    for group in (3, 7, 8, 9, 12, 16, 17):
        lengths = [(1, n) for n in (1, 64, 255, 257, 600)]
        groups = Batch(lengths, 2 * group, 2, head_dim=64, value_mean=10.0)
        yield Case(f"decode-groups-of-{group}", groups)
    # A thread takes several parts of one query, then those of another.
    parts = Batch([(1, n) for n in (2048, 2049, 2600, 4000)], 6, 2, head_dim=64, value_mean=10.0)
    yield Case("decodes-of-many-parts", replace(parts, query_scale=4.0))
    yield Case("no-gqa", Batch([(1, 40), (20, 20)], num_heads=3, num_kv_heads=3))
    # Heads that no power of two divides, over several parts of a sequence.
    for num_kv_heads in (3, 5, 9):
        lengths = [(1, 700), (1, 90), (3, 600)]
        heads = {"num_heads": 2 * num_kv_heads, "num_kv_heads": num_kv_heads, "head_dim": 64}
        yield Case(f"{num_kv_heads}-key-heads", Batch(lengths, value_mean=10.0, **heads))
    yield Case("one-key-head", Batch([(1, 40), (20, 33)], num_heads=5, num_kv_heads=1))
    several_tiles = Batch([(75, 75), (40, 260)], num_heads=7, num_kv_heads=1, head_dim=64)
    yield Case("rows-of-several-tiles", several_tiles)
    mixture = [(1, 70), (1, 5), (33, 33), (17, 90), (1, 200), (5, 5)]
    yield Case("chunked-prefill-with-decodes", Batch(mixture))
    yield Case("padded-rows", Batch(mixture, num_padded=7))
    yield Case("only-padding", Batch([], num_padded=3))
    yield Case("sequence-without-queries", Batch([(1, 20), (0, 0), (0, 30), (4, 9)]))
    for window in (1, 7, 16, 64):
        windowed = Batch(mixture, sliding_window=window, value_mean=10.0)
        yield Case(f"sliding-window-{window}", windowed)
    long_window = Batch([(1, 900), (130, 700)], sliding_window=300, value_mean=10.0)
    yield Case("long-sliding-window", long_window)
    for head_dim in (4, 16, 24, 80, 96, 128, 256):
        yield Case(f"head-of-{head_dim}", Batch([(1, 70), (9, 40)], head_dim=head_dim))
    for block_size in (1, 5, 32, 128):
        yield Case(f"blocks-of-{block_size}", Batch([(1, 70), (40, 45)], block_size=block_size))
    yield Case("sharp-softmax", Batch([(1, 70), (40, 45)], query_scale=40.0))
    yield Case("strided-queries", Batch(mixture, is_strided=True))
