"""rms_norm for CPUs. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import struct

import torch

from . import native
from .tensors import DTYPE_CODES, is_vector, supported

__all__ = ["accepts", "rms_norm", "supported"]

ARGUMENTS = struct.Struct("PPPPqqqqqqf")
"""RmsNormArgs in src/level.h."""


def accepts(x: torch.Tensor, weight: torch.Tensor, eps: float) -> bool:
    fits = x.dtype in DTYPE_CODES and x.ndim in (2, 3) and x.stride()[-1] == 1
    return fits and is_vector(weight, x.shape[-1], x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    shape, strides = x.shape, x.stride()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    num_inner, inner_stride = (1, 0) if len(shape) == 2 else (shape[1], strides[1])
    pointers = x.data_ptr(), 0, weight.data_ptr(), out.data_ptr()
    sizes = shape[0], num_inner, shape[-1], strides[0], inner_stride, 0
    native.call("rms_norm", DTYPE_CODES[x.dtype], ARGUMENTS.pack(*pointers, *sizes, eps))
    return out
