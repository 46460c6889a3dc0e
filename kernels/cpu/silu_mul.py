"""silu_mul for CPUs. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import struct

import torch

from . import native
from .tensors import DTYPE_CODES, has_rows, supported

__all__ = ["accepts", "silu_mul", "supported"]

_ARGUMENTS = struct.Struct("PPqqq")
"""SiluMulArgs in src/level.h."""


def accepts(gate_up: torch.Tensor) -> bool:
    return has_rows(gate_up) and gate_up.shape[1] % 2 == 0


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    num_rows, width = gate_up.shape
    size = width // 2
    out = gate_up.new_empty(num_rows, size)
    sizes = num_rows, size, gate_up.stride()[0]
    arguments = _ARGUMENTS.pack(gate_up.data_ptr(), out.data_ptr(), *sizes)
    native.call("silu_mul", DTYPE_CODES[gate_up.dtype], arguments)
    return out
