"""sample in Triton: one program a row. Knows no model; kernels/reference defines it.

A cut's least logit is found bit by bit, from the highest, among integers that are in the order of
the floats: each bit is a pass over the row, which a second-level cache holds. Rows that are not cut
take three passes, those that are not drawn one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..draws import DRAW_WORDS
from .tensors import has_rows, supported

__all__ = ["accepts", "sample", "supported"]

WIDTH = 4096
ABSENT_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Lowest bits that are zero in every float32 which was one of these."""


def accepts(logits: torch.Tensor, draws: torch.Tensor) -> bool:
    is_drawn = draws.shape == (logits.shape[0], DRAW_WORDS) and draws.is_contiguous()
    return has_rows(logits) and logits.shape[1] > 0 and is_drawn and draws.dtype is torch.int32


def sample(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    num_rows, size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows:
        width = min(WIDTH, triton.next_power_of_2(size))
        floats, doubles = draws.view(torch.float32), draws.view(torch.float64)
        _sample[(num_rows,)](
            logits, draws, floats, doubles, out, logits.stride(0), size,
            WIDTH=width, WORDS=DRAW_WORDS, LOWEST_BIT=ABSENT_BITS[logits.dtype],
        )  # fmt: skip
    return out


@triton.jit
def _sample(
    logits, draws, floats, doubles, out, row_stride, size,
    WIDTH: tl.constexpr, WORDS: tl.constexpr, LOWEST_BIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    most, token, is_finite = _largest(logits, size, WIDTH)
    temperature = tl.load(floats + row * WORDS)
    if is_finite & (temperature > 0):
        scale = 1.4426950408889634 / temperature
        top_k = tl.load(draws + row * WORDS + 1)
        top_p = tl.load(floats + row * WORDS + 2)
        min_p = tl.load(floats + row * WORDS + 3)
        uniform = tl.load(doubles + row * (WORDS // 2) + 2)
        least = most * 0.0 - 3.4028234663852886e38
        if (top_k > 0) & (top_k < size):
            least = _least_of_top_k(logits, size, top_k, WIDTH, LOWEST_BIT)
        if top_p < 1.0:
            least = _least_of_top_p(logits, size, most, scale, least, top_p, WIDTH, LOWEST_BIT)
        token = _crossing(logits, size, most, scale, least, min_p, uniform, WIDTH)
    tl.store(out + row, tl.where(is_finite, token, -1))


@triton.jit
def _largest(logits, size, WIDTH: tl.constexpr):
    """The largest number, its first place, and whether all are finite."""
    best = tl.full((WIDTH,), float("-inf"), tl.float32)
    where = tl.full((WIDTH,), 0, tl.int32)
    poison = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, size, WIDTH):
        places = start + tl.arange(0, WIDTH)
        inside = places < size
        x = tl.load(logits + places, mask=inside, other=0.0).to(tl.float32)
        poison += x - x  # not a number where x is not finite
        is_better = inside & (x > best)
        where = tl.where(is_better, places, where)
        best = tl.where(is_better, x, best)
    most = tl.max(best, 0)
    # Each lane keeps its first best place: the first of all is the least among the best lanes.
    first = tl.min(tl.where(best == most, where, size), 0)
    return most, first, tl.sum(poison, 0) == 0.0


@triton.jit
def _least_of_top_k(logits, size, top_k, WIDTH: tl.constexpr, LOWEST_BIT: tl.constexpr):
    place = top_k.to(tl.int64) * 0
    for step in range(32 - LOWEST_BIT):
        trial = place | (tl.full((), 1, tl.int64) << (31 - step))
        bound = _float_at(trial)
        count = top_k * 0
        for start in range(0, size, WIDTH):
            x = _logits_at(logits, start + tl.arange(0, WIDTH), size)
            count += tl.sum((x >= bound).to(tl.int32), 0)
        if count >= top_k:
            place = trial
    return _float_at(place)


@triton.jit
def _least_of_top_p(
    logits, size, most, scale, least, top_p, WIDTH: tl.constexpr, LOWEST_BIT: tl.constexpr
):
    all_kept = _mass(logits, size, most, scale, least, 0.0, WIDTH)
    wanted = top_p.to(tl.float64) * all_kept.to(tl.float64)
    place = all_kept * 0
    for step in range(32 - LOWEST_BIT):
        trial = place | (tl.full((), 1, tl.int64) << (31 - step))
        bound = tl.maximum(_float_at(trial), least)
        mass = _mass(logits, size, most, scale, bound, 0.0, WIDTH)
        if mass.to(tl.float64) >= wanted:
            place = trial
    return tl.maximum(_float_at(place), least)


@triton.jit
def _crossing(logits, size, most, scale, least, min_p, uniform, WIDTH: tl.constexpr):
    """Where the weights add up to more than `uniform` times all of them."""
    total = _mass(logits, size, most, scale, least, min_p, WIDTH)
    target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    token = size
    before = total * 0
    for start in range(0, size, WIDTH):
        places = start + tl.arange(0, WIDTH)
        weights = _weights(_logits_at(logits, places, size), most, scale, least, min_p)
        crossed = before + tl.cumsum(weights, 0) > target
        token = tl.minimum(token, tl.min(tl.where(crossed, places, size), 0))
        before += tl.sum(weights, 0)
    return token


@triton.jit
def _logits_at(logits, places, size):
    """-inf past the end."""
    return tl.load(logits + places, mask=places < size, other=float("-inf")).to(tl.float32)


@triton.jit
def _float_at(place):
    """The float at a place, an int64 of 32 bits, in the order of floats; below the least, NaN."""
    key = (place - 2147483648).to(tl.int32)
    bits = tl.where(key >= 0, key, key ^ 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _weights(x, most, scale, least, min_p):
    share = tl.exp2((x - most) * scale)
    share = tl.where((x >= least) & (share >= min_p), share, 0.0)
    wide = share * 1099511627776.0
    # Larger ones are integers already; the sum rounds the others, to the nearest even.
    return tl.where(wide < 8388608.0, (wide + 8388608.0) - 8388608.0, wide).to(tl.int64)


@triton.jit
def _mass(logits, size, most, scale, least, min_p, WIDTH: tl.constexpr):
    total = tl.zeros((WIDTH,), tl.int64)
    for start in range(0, size, WIDTH):
        x = _logits_at(logits, start + tl.arange(0, WIDTH), size)
        total += _weights(x, most, scale, least, min_p)
    return tl.sum(total, 0)
