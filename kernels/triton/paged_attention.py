"""paged_attention in Triton: prompts and decodes by one kernel, long contexts split.

A program takes a few queries of one sequence with all query heads of one key head, so keys and
values are read once for a group. Which sequence that is, it finds in query_start: the grid depends
on shapes alone. Where all sequences decode, contexts are cut into splits whose results a second
kernel joins (flash-decoding). Softmax is online, in base 2 and fp32. Knows no model;
kernels/reference defines it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tensors import has_heads, is_float_cache, supported
from .tiles import DECODES, PROMPTS, Tiles

__all__ = ["accepts", "paged_attention", "supported"]

MIN_SPLIT_KEYS = 256
WANTED_PROGRAMS = 256
"""About two for each multiprocessor of a large GPU; fewer sequences than that are split."""
MAX_SPLITS = 32
LOG2_E = 1.4426950408889634


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
    are_caches = all(is_float_cache(cache, q.shape[2], q.dtype) for cache in (k_cache, v_cache))
    return has_heads(q) and are_caches and q.shape[1] % k_cache.shape[2] == 0


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
    lists = block_tables, query_start, context_lens
    return attend(q, k_cache, v_cache, None, lists, scale, sliding_window)


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
    lists: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    sliding_window: int,
    is_invariant: bool = False,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """`scales`: of int8 caches, of keys and values; `lists`: tables, query_start, context_lens.

    `is_invariant`: a row's result does not depend on how many there are. Then long contexts are not
    split, which costs most where few sequences decode. `tiles`: others than those in use.
    """
    num_tokens, num_heads, head_dim = q.shape
    block_tables, query_start, context_lens = lists
    num_seqs, block_size, num_kv_heads = len(context_lens), k_cache.shape[1], k_cache.shape[2]
    k_scales, v_scales = scales or (k_cache, v_cache)
    # What belongs to no sequence is padding, and 0.
    out = torch.zeros((num_tokens, num_heads * head_dim), dtype=q.dtype, device=q.device)
    if not (num_tokens and num_seqs):
        return out
    group = num_heads // num_kv_heads
    is_decode = num_tokens <= num_seqs and not is_invariant
    tiles = tiles or (DECODES if is_decode else PROMPTS)
    rows = max(tiles.rows, triton.next_power_of_2(group))
    queries = rows // group
    num_blocks = num_tokens // queries + num_seqs
    max_keys = block_tables.shape[1] * block_size
    splits = num_splits(num_blocks * num_kv_heads, max_keys) if is_decode else 1
    partial = torch.empty(
        (splits if splits > 1 else 0, num_tokens, num_heads, head_dim + 2),
        dtype=torch.float32, device=q.device,
    )  # fmt: skip
    width = triton.next_power_of_2(head_dim)
    _attend[(num_blocks, num_kv_heads, splits)](
        q, k_cache, v_cache, k_scales, v_scales, out, partial,
        block_tables, query_start, context_lens,
        scale * LOG2_E, q.stride(0), k_cache.stride(0), v_cache.stride(0),
        k_scales.stride(0), v_scales.stride(0), block_tables.stride(0),
        num_seqs, num_tokens, num_heads, num_kv_heads, block_size, head_dim, sliding_window,
        GROUP=group, QUERIES=queries, ROWS=rows, KEYS=tiles.keys, WIDTH=width,
        IS_SPLIT=splits > 1, HAS_SCALES=scales is not None, STEPS=max(1, num_seqs.bit_length()),
        PRECISION="ieee" if q.dtype is torch.float32 else "tf32",
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if splits > 1:
        _join[(num_tokens, num_heads)](
            partial, out, query_start, num_seqs, num_tokens, head_dim,
            SPLITS=splits, SPLITS_WIDTH=triton.next_power_of_2(splits), WIDTH=width,
        )  # fmt: skip
    return out


def num_splits(num_programs: int, max_keys: int) -> int:
    """So many that the device is busy, each long enough to be worth a second kernel's reading."""
    by_programs = -(-WANTED_PROGRAMS // num_programs)
    return max(1, min(by_programs, max_keys // MIN_SPLIT_KEYS, MAX_SPLITS))


@triton.jit
def _attend(
    q, k_cache, v_cache, k_scales, v_scales, out, partial,
    block_tables, query_start, context_lens,
    scale, q_stride, k_block_stride, v_block_stride, k_scale_stride, v_scale_stride, table_stride,
    num_seqs, num_tokens, num_heads, num_kv_heads, block_size, head_dim, sliding_window,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, IS_SPLIT: tl.constexpr, HAS_SCALES: tl.constexpr, STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    block, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = _sequence_of(block, query_start, num_seqs, QUERIES, STEPS)
    begin = tl.load(query_start + sequence)
    first_query = (block - (begin // QUERIES + sequence)) * QUERIES
    num_queries = tl.load(query_start + sequence + 1) - begin
    if first_query < num_queries:
        rows, dims = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        query = first_query + rows // GROUP
        head = kv_head * GROUP + rows % GROUP
        is_row, is_dim = (rows // GROUP < QUERIES) & (query < num_queries), dims < head_dim
        inside = is_row[:, None] & is_dim[None, :]
        token = (begin + query).to(tl.int64)
        places = token[:, None] * q_stride + head[:, None] * head_dim + dims[None, :]
        queries = tl.load(q + places, mask=inside, other=0.0)
        num_before = tl.load(context_lens + sequence) - num_queries
        position = num_before + query
        first_key = 0
        if sliding_window > 0:
            first_key = tl.maximum(0, num_before + first_query - sliding_window + 1)
        end_key = num_before + tl.minimum(first_query + QUERIES, num_queries)
        if IS_SPLIT:
            first_key, end_key = _part_of(first_key, end_key, split, KEYS)
        most, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
        sums = tl.zeros((ROWS, WIDTH), tl.float32)
        table = block_tables + sequence * table_stride
        for start in range(first_key, end_key, KEYS):
            keys = start + tl.arange(0, KEYS)
            is_key = keys < end_key
            cell = tl.load(table + keys // block_size, mask=is_key, other=0).to(tl.int64)
            within = keys % block_size * num_kv_heads + kv_head
            k_at = (cell * k_block_stride + within * head_dim)[None, :] + dims[:, None]
            k = _load(k_cache + k_at, is_dim[:, None] & is_key[None, :], queries.dtype)
            v_at = (cell * v_block_stride + within * head_dim)[:, None] + dims[None, :]
            v = _load(v_cache + v_at, is_key[:, None] & is_dim[None, :], queries.dtype)
            visible = is_key[None, :] & (keys[None, :] <= position[:, None])
            if sliding_window > 0:
                visible = visible & (keys[None, :] > position[:, None] - sliding_window)
            k_scale = _factors(k_scales + cell * k_scale_stride + within, is_key, HAS_SCALES)
            v_scale = _factors(v_scales + cell * v_scale_stride + within, is_key, HAS_SCALES)
            scores = tl.dot(queries, k, input_precision=PRECISION) * scale * k_scale
            scores = tl.where(visible, scores, float("-inf"))
            most, total, sums = _weigh(scores, v, v_scale, most, total, sums, PRECISION)
        if IS_SPLIT:
            cell = ((split.to(tl.int64) * num_tokens + token) * num_heads + head) * (head_dim + 2)
            _keep(partial + cell, sums, most, total, head_dim, dims, is_row, inside)
        else:
            # Rows that are no queries have seen nothing; they are not stored.
            result = sums / tl.where(is_row, total, 1.0)[:, None]
            places = (token * num_heads + head)[:, None] * head_dim + dims[None, :]
            tl.store(out + places, result.to(queries.dtype), mask=inside)


@triton.jit
def _part_of(first_key, end_key, split, KEYS: tl.constexpr):
    """Shared out by the sequence's own keys: tables are as wide as the longest there may be."""
    num_tiles = tl.cdiv(tl.cdiv(end_key - first_key, KEYS), tl.num_programs(2))
    begin = first_key + split * num_tiles * KEYS
    return begin, tl.minimum(end_key, begin + num_tiles * KEYS)


@triton.jit
def _load(at, inside, dtype: tl.constexpr):
    """Zeros outside. One byte, of int8 or fp8, is exact in any of the queries' dtypes."""
    return tl.where(inside, tl.load(at, mask=inside).to(dtype), 0.0)


@triton.jit
def _factors(at, is_key, HAS_SCALES: tl.constexpr):
    factors = 1.0
    if HAS_SCALES:
        factors = tl.load(at, mask=is_key, other=0.0)[None, :]
    return factors


@triton.jit
def _sequence_of(block, query_start, num_seqs, QUERIES: tl.constexpr, STEPS: tl.constexpr):
    """Sequence s owns blocks query_start[s] // QUERIES + s and on: the last s that begins by it."""
    low, high = 0, num_seqs
    for _ in range(STEPS):
        middle = (low + high) // 2
        first = tl.load(query_start + tl.minimum(middle, num_seqs - 1)) // QUERIES + middle
        is_below = (first <= block) & (middle < high)
        low = tl.where(is_below, middle, low)
        high = tl.where(is_below, high, middle)
    return low


@triton.jit
def _weigh(scores, v, v_scale, most, total, sums, PRECISION: tl.constexpr):
    """One more tile of an online softmax: maxima, totals and weighted sums with it."""
    highest = tl.maximum(most, tl.max(scores, 1))
    # A row that has seen nothing yet: any finite shift makes its weights 0, not NaN.
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(most - shift)
    total = total * rescale + tl.sum(weights, 1)
    sums = sums * rescale[:, None]
    sums += tl.dot((weights * v_scale).to(v.dtype), v, input_precision=PRECISION)
    return highest, total, sums


@triton.jit
def _keep(at, sums, most, total, head_dim, dims, is_row, inside):
    """What a split found, for _join."""
    tl.store(at[:, None] + dims[None, :], sums, mask=inside)
    tl.store(at + head_dim, most, mask=is_row)
    tl.store(at + head_dim + 1, total, mask=is_row)


@triton.jit
def _join(
    partial, out, query_start, num_seqs, num_tokens, head_dim,
    SPLITS: tl.constexpr, SPLITS_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_heads = tl.num_programs(1)
    if token < tl.load(query_start + num_seqs):
        splits, dims = tl.arange(0, SPLITS_WIDTH), tl.arange(0, WIDTH)
        is_split, is_dim = splits < SPLITS, dims < head_dim
        cell = (splits.to(tl.int64) * num_tokens + token) * num_heads + head
        at = partial + cell * (head_dim + 2)
        most = tl.load(at + head_dim, mask=is_split, other=float("-inf"))
        totals = tl.load(at + head_dim + 1, mask=is_split, other=0.0)
        # A split past the end of a short context has seen nothing: -inf, and weight 0.
        weights = tl.exp2(most - tl.max(most, 0))
        inside = is_split[:, None] & is_dim[None, :]
        sums = tl.load(at[:, None] + dims[None, :], mask=inside, other=0.0)
        result = tl.sum(sums * weights[:, None], 0) / tl.sum(totals * weights, 0)
        places = (token * num_heads + head) * head_dim + dims
        tl.store(out + places, result.to(out.dtype.element_ty), mask=is_dim)
