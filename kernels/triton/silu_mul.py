"""silu_mul in Triton. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tensors import has_rows, supported

__all__ = ["accepts", "silu_mul", "supported"]

WIDTH = 1024
"""Elements of a row that one program computes."""


def accepts(gate_up: torch.Tensor) -> bool:
    return has_rows(gate_up) and gate_up.shape[1] % 2 == 0


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows and size:
        grid = (num_rows, triton.cdiv(size, WIDTH))
        _silu_mul[grid](gate_up, out, gate_up.stride(0), size, WIDTH=WIDTH)
    return out


@triton.jit
def _silu_mul(gate_up, out, row_stride, size, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = places < size
    gate = tl.load(gate_up + row * row_stride + places, mask=inside, other=0.0)
    up = tl.load(gate_up + row * row_stride + size + places, mask=inside, other=0.0)
    x = gate.to(tl.float32)
    # 1 / (1 + exp(-x)) of a large negative x divides by infinity, and is 0 as it should be.
    silu = (x / (1.0 + tl.exp(-x))).to(gate.dtype)
    product = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * size + places, product.to(gate.dtype), mask=inside)
