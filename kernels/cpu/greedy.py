"""greedy for CPUs. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import struct

import torch

from . import native
from .tensors import DTYPE_CODES, has_rows, supported

__all__ = ["accepts", "greedy", "supported"]

_ARGUMENTS = struct.Struct("PPqqq")
"""GreedyArgs in src/level.h."""


def accepts(logits: torch.Tensor) -> bool:
    return has_rows(logits) and logits.shape[1] > 0


def greedy(logits: torch.Tensor) -> torch.Tensor:
    num_rows, size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int32)
    sizes = num_rows, size, logits.stride()[0]
    arguments = _ARGUMENTS.pack(logits.data_ptr(), out.data_ptr(), *sizes)
    native.call("greedy", DTYPE_CODES[logits.dtype], arguments)
    return out
