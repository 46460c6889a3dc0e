"""packed_gate_up for CPUs. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import torch

from ..layout_names import PANEL
from . import native
from .packed_linear import ARGUMENTS
from .tensors import WEIGHT_CODES, fits, has_rows, is_panels, supported

__all__ = ["accepts", "packed_gate_up", "supported"]


def accepts(x: torch.Tensor, weight: torch.Tensor) -> bool:
    num_panels = weight.shape[0]
    if not (has_rows(x) and fits(x, weight) and num_panels % 2 == 0):
        return False
    return is_panels(weight, num_panels * PANEL, x.shape[1])


def packed_gate_up(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0] * PANEL // 2
    out = x.new_empty(num_rows, num_outputs)
    pointers = x.data_ptr(), weight.data_ptr(), 0, out.data_ptr()
    sizes = num_rows, num_inputs, num_outputs, x.stride()[0]
    native.call("packed_gate_up", WEIGHT_CODES[weight.dtype], ARGUMENTS.pack(*pointers, *sizes))
    return out
