"""add_rms_norm for CPUs. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import torch

from . import native
from .rms_norm import ARGUMENTS
from .tensors import DTYPE_CODES, has_rows, is_vector, supported

__all__ = ["accepts", "add_rms_norm", "supported"]


def accepts(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> bool:
    if not (has_rows(x) and has_rows(residual)):
        return False
    same = residual.shape == x.shape and residual.dtype is x.dtype
    return same and is_vector(weight, x.shape[1], x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    num_rows, size = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    pointers = x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr()
    sizes = num_rows, 1, size, x.stride()[0], 0, residual.stride()[0]
    native.call("rms_norm", DTYPE_CODES[x.dtype], ARGUMENTS.pack(*pointers, *sizes, eps))
    return out
