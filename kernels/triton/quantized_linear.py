"""quantized_linear in Triton: weights become numbers of the rows' dtype as they are multiplied.

A program computes a tile of rows and outputs over all inputs; products are added in fp32. Knows no
model; kernels/reference says what it computes, kernels/quantized.py how the words lie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..layout_names import PANEL, quantized_shapes
from .tensors import has_rows, supported

__all__ = ["accepts", "quantized_linear", "supported"]

MAX_ROWS, OUTPUTS, INPUTS = 64, 64, 64


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
    shape, _ = quantized_shapes(bits, group_size, num_outputs, x.shape[-1])
    return has_rows(x) and words.shape == shape and words.is_contiguous()


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
    rows = min(MAX_ROWS, max(16, triton.next_power_of_2(len(x))))
    return multiply(x, words, scales, (zeros, order, bias), bits, group_size, num_outputs, rows)


def multiply(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    optional: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    bits: int,
    group_size: int,
    num_outputs: int,
    rows: int,
) -> torch.Tensor:
    """`optional`: zeros, order, bias; `rows`: of a tile."""
    num_rows, num_inputs = x.shape
    zeros, order, bias = optional
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    if num_rows:
        # What is absent is not read: any tensor stands for it.
        given = (words if t is None else t for t in optional)
        _quantized_linear[(triton.cdiv(num_rows, rows), triton.cdiv(num_outputs, OUTPUTS))](
            x, words, scales, *given, out, x.stride(0), num_rows, num_inputs, num_outputs,
            words.shape[1], scales.shape[1], min(group_size, num_inputs),
            BITS=bits, PANEL=PANEL, ROWS=rows, OUTPUTS=OUTPUTS, INPUTS=INPUTS,
            HAS_ZEROS=zeros is not None, HAS_ORDER=order is not None, HAS_BIAS=bias is not None,
            PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
        )  # fmt: skip
    return out


@triton.jit
def _quantized_linear(
    x, words, scales, zeros, order, bias, out,
    row_stride, num_rows, num_inputs, num_outputs, num_words, num_groups, group_size,
    BITS: tl.constexpr, PANEL: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    HAS_ZEROS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    PER_WORD: tl.constexpr = 32 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row, is_output = rows < num_rows, outputs < num_outputs
    panels, lanes = (outputs // PANEL).to(tl.int64), outputs % PANEL
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, num_inputs, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        is_input = inputs < num_inputs
        places = inputs
        if HAS_ORDER:
            places = tl.load(order + inputs, mask=is_input, other=0)
        at = rows[:, None].to(tl.int64) * row_stride + places[None, :]
        left = tl.load(x + at, mask=is_row[:, None] & is_input[None, :], other=0.0)
        inside = is_input[:, None] & is_output[None, :]
        panel = panels[None, :] * PANEL
        at = panel * num_words + (inputs // PER_WORD * PANEL)[:, None] + lanes[None, :]
        held = tl.load(words + at, mask=inside, other=0)
        fields = (held >> (inputs % PER_WORD * BITS)[:, None]) & MASK
        at = panel * num_groups + (inputs // group_size * PANEL)[:, None] + lanes[None, :]
        scale = tl.load(scales + at, mask=inside, other=0.0)
        zero = 1 << (BITS - 1)
        weights = fields.to(tl.float32) - zero
        if HAS_ZEROS:
            weights = fields.to(tl.float32) - tl.load(zeros + at, mask=inside, other=0.0)
        total += tl.dot(left, (weights * scale).to(left.dtype), input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    at = rows[:, None].to(tl.int64) * num_outputs + outputs[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])
