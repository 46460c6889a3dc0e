"""packed_embedding for CPUs. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import struct

import torch

from . import native
from .tensors import WEIGHT_CODES, is_panels, is_vector, supported

__all__ = ["accepts", "packed_embedding", "supported"]

_ARGUMENTS = struct.Struct("PPPqqq")
"""PackedEmbeddingArgs in src/level.h."""


def accepts(
    token_ids: torch.Tensor, weight: torch.Tensor, num_outputs: int, num_inputs: int
) -> bool:
    is_ids = token_ids.ndim == 1 and is_vector(token_ids, token_ids.shape[0], torch.int32)
    return is_ids and weight.dtype in WEIGHT_CODES and is_panels(weight, num_outputs, num_inputs)


def packed_embedding(
    token_ids: torch.Tensor, weight: torch.Tensor, num_outputs: int, num_inputs: int
) -> torch.Tensor:
    num_rows = token_ids.shape[0]
    dtype = torch.bfloat16 if weight.dtype is torch.int16 else weight.dtype
    out = weight.new_empty(num_rows, num_inputs, dtype=dtype)
    pointers = token_ids.data_ptr(), weight.data_ptr(), out.data_ptr()
    arguments = _ARGUMENTS.pack(*pointers, num_rows, num_inputs, num_outputs)
    native.call("packed_embedding", WEIGHT_CODES[weight.dtype], arguments)
    return out
