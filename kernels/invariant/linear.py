"""linear in Triton, tiles of one shape for any number of rows.

A library chooses another kernel, or splits the sum, where the number of rows is another: a row's
last bits then depend on what else is in the batch. Here each output is summed along the inputs in
the same steps always. Slower where a library knows better. Knows no model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton.tensors import has_rows, supported

__all__ = ["accepts", "linear", "supported"]

ROWS, OUTPUTS, INPUTS = 64, 64, 64
"""Of a tile. Few rows waste the products, not the bytes, and bytes are what they wait for."""


def accepts(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    is_bias = bias is None or bias.is_contiguous()
    return has_rows(x) and weight.is_contiguous() and weight.dtype is x.dtype and is_bias


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0]
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    if num_rows and num_outputs:
        # Programs that share weights run one after another: their tile is read once.
        grid = (triton.cdiv(num_rows, ROWS), triton.cdiv(num_outputs, OUTPUTS))
        _linear[grid](
            x, weight, weight if bias is None else bias, out,
            num_rows, num_outputs, num_inputs, x.stride(0),
            ROWS=ROWS, OUTPUTS=OUTPUTS, INPUTS=INPUTS, HAS_BIAS=bias is not None,
            PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
        )  # fmt: skip
    return out


@triton.jit
def _linear(
    x, weight, bias, out, num_rows, num_outputs, num_inputs, x_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row, is_output = rows < num_rows, outputs < num_outputs
    x_at = x + rows.to(tl.int64)[:, None] * x_stride
    weight_at = weight + outputs.to(tl.int64)[None, :] * num_inputs
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, num_inputs, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        is_input = inputs < num_inputs
        left = tl.load(x_at + inputs[None, :], mask=is_row[:, None] & is_input[None, :], other=0.0)
        right = tl.load(
            weight_at + inputs[:, None], mask=is_input[:, None] & is_output[None, :], other=0.0
        )
        total += tl.dot(left, right, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    places = rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    tl.store(
        out + places, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_output[None, :]
    )
