"""linear for CPUs and few rows. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import struct

import torch

from . import native, tensors
from .tensors import DTYPE_CODES, has_rows, is_vector

_ARGUMENTS = struct.Struct("PPPPqqqq")
"""LinearArgs in src/level.h."""

MOST_ROWS = 64
"""For more rows it pays to repack the weights, as torch's libraries do."""


def supported(device: torch.device, dtype: torch.dtype) -> bool:
    """At the generic level torch's own instruction sets are the better choice."""
    return tensors.supported(device, dtype) and native.level() != "generic"


def accepts(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    if not has_rows(x) or x.shape[0] > MOST_ROWS or weight.ndim != 2:
        return False
    num_outputs, num_inputs = weight.shape
    fits = num_inputs == x.shape[1] and weight.dtype is x.dtype and weight.is_contiguous()
    return fits and (bias is None or is_vector(bias, num_outputs, x.dtype))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0]
    out = x.new_empty(num_rows, num_outputs)
    added = 0 if bias is None else bias.data_ptr()
    pointers = x.data_ptr(), weight.data_ptr(), added, out.data_ptr()
    sizes = num_rows, num_inputs, num_outputs, x.stride()[0]
    native.call("linear", DTYPE_CODES[x.dtype], _ARGUMENTS.pack(*pointers, *sizes))
    return out
