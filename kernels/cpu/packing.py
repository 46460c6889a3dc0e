"""Packs weight matrices with the native library. kernels/layouts.py says what comes out."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ..layout_names import PANEL16_INT12, stored_shape
from . import native
from .tensors import DTYPE_CODES, WEIGHT_CODES

_ARGUMENTS = struct.Struct("PPPqq")
"""PackArgs in src/level.h."""


def accepts(weight: Tensor, layout: str) -> bool:
    is_here = weight.device.type == "cpu" and native.library() is not None
    dtypes = (torch.bfloat16,) if layout == PANEL16_INT12 else tuple(DTYPE_CODES)
    return is_here and weight.dtype in dtypes and weight.ndim == 2 and weight.is_contiguous()


def pack(first: Tensor, second: Tensor | None, layout: str) -> Tensor:
    num_outputs, num_inputs = first.shape
    num_panels, *panel = stored_shape(layout, num_outputs, num_inputs, first.element_size())
    dtype = torch.int16 if layout == PANEL16_INT12 else first.dtype
    out = torch.empty((num_panels * (1 if second is None else 2), *panel), dtype=dtype)
    other = 0 if second is None else second.data_ptr()
    arguments = _ARGUMENTS.pack(first.data_ptr(), other, out.data_ptr(), num_outputs, num_inputs)
    native.call("pack_panels", WEIGHT_CODES[dtype], arguments)
    return out
