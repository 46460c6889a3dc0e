"""quantized_linear for CPUs. Knows no model; kernels/reference says what it computes."""

from __future__ import annotations

import struct

import torch

from ..layout_names import quantized_shapes
from . import native
from .tensors import DTYPE_CODES, has_rows, is_vector, supported

__all__ = ["accepts", "quantized_linear", "supported"]

ARGUMENTS = struct.Struct("9P6q")
"""QuantizedLinearArgs in src/level.h."""
BLOCK_INPUTS = 128
"""kBlockInputs in src/quantized.h; a row keeps two numbers for each block."""


def accepts(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    num_outputs: int,
) -> bool:
    """Groups must consist of whole words."""
    num_inputs = x.shape[-1]
    if not has_rows(x) or (group_size % (32 // bits) and group_size < num_inputs):
        return False
    words_shape, groups_shape = quantized_shapes(bits, group_size, num_outputs, num_inputs)
    return (
        words.shape == words_shape
        and words.dtype is torch.int32
        and words.is_contiguous()
        and _are_groups(scales, groups_shape)
        and (zeros is None or _are_groups(zeros, groups_shape))
        and (order is None or is_vector(order, num_inputs, torch.int32))
        and (bias is None or is_vector(bias, num_outputs, x.dtype))
    )


def _are_groups(values: torch.Tensor, shape: tuple[int, ...]) -> bool:
    return values.shape == shape and values.dtype is torch.float32 and values.is_contiguous()


def quantized_linear(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    num_outputs: int,
) -> torch.Tensor:
    num_rows, num_inputs = x.shape
    out = x.new_empty(num_rows, num_outputs)
    per_word = 32 // bits
    stride, num_groups = -(-num_inputs // per_word) * per_word, scales.shape[1]
    num_blocks = num_groups * -(-min(group_size, num_inputs) // BLOCK_INPUTS)
    rows = scales.new_empty(num_rows, stride)
    sums = scales.new_empty(num_rows, 2 * num_blocks)
    given = (0 if t is None else t.data_ptr() for t in (zeros, order, bias))
    native.call(
        "quantized_linear",
        DTYPE_CODES[x.dtype],
        ARGUMENTS.pack(
            x.data_ptr(), words.data_ptr(), scales.data_ptr(), *given, out.data_ptr(),
            rows.data_ptr(), sums.data_ptr(), num_rows, num_inputs, num_outputs, x.stride()[0],
            bits, group_size,
        ),
    )  # fmt: skip
    return out
