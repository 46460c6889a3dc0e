"""quantized_linear in Triton, tiles of one shape for any number of rows.

Knows no model; kernels/reference says what it computes.
"""

from __future__ import annotations

import torch

from ..triton.quantized_linear import MAX_ROWS, accepts, multiply, supported

__all__ = ["accepts", "quantized_linear", "supported"]


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
    optional = zeros, order, bias
    return multiply(x, words, scales, optional, bits, group_size, num_outputs, MAX_ROWS)
