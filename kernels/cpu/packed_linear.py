"""packed_linear for CPUs. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import struct

import torch

from . import native
from .tensors import WEIGHT_CODES, fits, has_rows, is_panels, is_vector, supported

__all__ = ["accepts", "packed_linear", "supported"]

ARGUMENTS = struct.Struct("PPPPqqqq")
"""PackedLinearArgs in src/level.h."""


def accepts(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, num_outputs: int
) -> bool:
    if not (has_rows(x) and fits(x, weight) and is_panels(weight, num_outputs, x.shape[1])):
        return False
    return bias is None or is_vector(bias, num_outputs, x.dtype)


def packed_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, num_outputs: int
) -> torch.Tensor:
    num_rows, num_inputs = x.shape
    out = x.new_empty(num_rows, num_outputs)
    added = 0 if bias is None else bias.data_ptr()
    pointers = x.data_ptr(), weight.data_ptr(), added, out.data_ptr()
    sizes = num_rows, num_inputs, num_outputs, x.stride()[0]
    native.call("packed_linear", WEIGHT_CODES[weight.dtype], ARGUMENTS.pack(*pointers, *sizes))
    return out
