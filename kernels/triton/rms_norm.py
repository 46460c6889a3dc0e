"""rms_norm in Triton: one program a row. Knows no model; kernels/reference defines it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tensors import DTYPES, supported

__all__ = ["accepts", "normalised", "rms_norm", "supported"]


def accepts(x: torch.Tensor, weight: torch.Tensor, eps: float) -> bool:
    is_rows = x.ndim in (2, 3) and x.stride(-1) == 1 and x.dtype in DTYPES
    return is_rows and weight.shape == (x.shape[-1],) and weight.dtype is x.dtype


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x if x.ndim == 3 else x[:, None]
    num_rows, num_heads, size = rows.shape
    if num_rows:
        width = triton.next_power_of_2(size)
        _rms_norm[(num_rows, num_heads)](
            rows, weight, out, rows.stride(0), rows.stride(1), size, eps, WIDTH=width
        )
    return out


@triton.jit
def normalised(x, weight, size, eps, dtype: tl.constexpr):  # noqa: ANN201
    """The row x, fp32 with zeros behind `size`, times weight; rounded to dtype before and after."""
    scale = tl.rsqrt(tl.sum(x * x) / size + eps)
    return weight.to(tl.float32) * (x * scale).to(dtype).to(tl.float32)


@triton.jit
def _rms_norm(x, weight, out, row_stride, head_stride, size, eps, WIDTH: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    places = tl.arange(0, WIDTH)
    inside = places < size
    values = tl.load(x + row * row_stride + head * head_stride + places, mask=inside, other=0.0)
    factors = tl.load(weight + places, mask=inside, other=0.0)
    normal = normalised(values.to(tl.float32), factors, size, eps, values.dtype)
    at = (row * tl.num_programs(1) + head) * size + places
    tl.store(out + at, normal.to(values.dtype), mask=inside)
