"""add_rms_norm in Triton: one program a row. Knows no model; kernels/reference defines it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rms_norm import normalised
from .tensors import has_rows, supported

__all__ = ["accepts", "add_rms_norm", "supported"]


def accepts(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> bool:
    are_rows = has_rows(x) and has_rows(residual) and x.shape == residual.shape
    return are_rows and x.dtype is residual.dtype is weight.dtype


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    num_rows, size = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_rows:
        strides = x.stride(0), residual.stride(0)
        width = triton.next_power_of_2(size)
        _add_rms_norm[(num_rows,)](x, residual, weight, out, *strides, size, eps, WIDTH=width)
    return out


@triton.jit
def _add_rms_norm(
    x, residual, weight, out, x_stride, residual_stride, size, eps, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, WIDTH)
    inside = places < size
    added = tl.load(x + row * x_stride + places, mask=inside, other=0.0)
    at = residual + row * residual_stride + places
    values = (tl.load(at, mask=inside, other=0.0).to(tl.float32) + added.to(tl.float32)).to(
        added.dtype
    )
    tl.store(at, values, mask=inside)
    factors = tl.load(weight + places, mask=inside, other=0.0)
    normal = normalised(values.to(tl.float32), factors, size, eps, added.dtype)
    tl.store(out + row * size + places, normal.to(added.dtype), mask=inside)
