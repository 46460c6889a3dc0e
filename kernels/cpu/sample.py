"""sample for CPUs. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import struct

import torch

from ..draws import DRAW_WORDS
from . import native
from .tensors import DTYPE_CODES, has_rows, supported

__all__ = ["accepts", "sample", "supported"]

_ARGUMENTS = struct.Struct("PPPqqq")
"""SampleArgs in src/level.h."""


def accepts(logits: torch.Tensor, draws: torch.Tensor) -> bool:
    return (
        has_rows(logits)
        and logits.shape[1] > 0
        and draws.shape == (logits.shape[0], DRAW_WORDS)
        and draws.dtype is torch.int32
        and draws.is_contiguous()
    )


def sample(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    num_rows, size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int32)
    pointers = logits.data_ptr(), draws.data_ptr(), out.data_ptr()
    arguments = _ARGUMENTS.pack(*pointers, num_rows, size, logits.stride()[0])
    native.call("sample", DTYPE_CODES[logits.dtype], arguments)
    return out
