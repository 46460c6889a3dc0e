"""greedy in Triton: one program a row, one pass. Knows no model; kernels/reference defines it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tensors import has_rows, supported

__all__ = ["accepts", "greedy", "supported"]

WIDTH = 4096


def accepts(logits: torch.Tensor) -> bool:
    return has_rows(logits) and logits.shape[1] > 0


def greedy(logits: torch.Tensor) -> torch.Tensor:
    num_rows, size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows:
        width = min(WIDTH, triton.next_power_of_2(size))
        _greedy[(num_rows,)](logits, out, logits.stride(0), size, WIDTH=width)
    return out


@triton.jit
def _greedy(logits, out, row_stride, size, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    best = tl.full((WIDTH,), float("-inf"), tl.float32)
    where = tl.full((WIDTH,), 0, tl.int32)
    poison = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, size, WIDTH):
        places = start + tl.arange(0, WIDTH)
        inside = places < size
        x = tl.load(logits + row * row_stride + places, mask=inside, other=0.0).to(tl.float32)
        poison += x - x  # not a number where x is not finite
        is_better = inside & (x > best)
        where = tl.where(is_better, places, where)
        best = tl.where(is_better, x, best)
    most = tl.max(best, 0)
    # Each lane keeps its first best place: the first of all is the least among the best lanes.
    first = tl.min(tl.where(best == most, where, size), 0)
    is_finite = tl.sum(poison, 0) == 0.0
    tl.store(out + row, tl.where(is_finite, first, -1))
