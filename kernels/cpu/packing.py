"""Packs weight matrices with the native library. kernels/layouts.py says what comes out."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ..layout_names import PANEL16, stored_shape
from . import native
from .tensors import DTYPE_CODES

_ARGUMENTS = struct.Struct("PPPqq")
"""PackArgs in src/level.h."""


def accepts(weight: Tensor) -> bool:
    is_here = weight.device.type == "cpu" and native.library() is not None
    return is_here and weight.dtype in DTYPE_CODES and weight.ndim == 2 and weight.is_contiguous()


def pack(first: Tensor, second: Tensor | None) -> Tensor:
    num_outputs, num_inputs = first.shape
    num_panels, *panel = stored_shape(PANEL16, num_outputs, num_inputs, first.element_size())
    out = torch.empty((num_panels * (1 if second is None else 2), *panel), dtype=first.dtype)
    other = 0 if second is None else second.data_ptr()
    arguments = _ARGUMENTS.pack(first.data_ptr(), other, out.data_ptr(), num_outputs, num_inputs)
    native.call("pack_panels", DTYPE_CODES[first.dtype], arguments)
    return out
