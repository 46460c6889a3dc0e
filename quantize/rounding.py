"""One matrix to integers: to the nearest, or so that its outputs change least (GPTQ).

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323: inputs are quantised one after the other, and what each rounding
does to the outputs is taken up by the inputs that are still floats, by way of the inverse of the
Hessian of the squared error, H = X X^T. Knows matrices; knows no models and no files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.models.quantization import Scheme

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: what is hardly ever seen must not decide anything."""
BLOCK = 128
"""Inputs whose errors are spread at once, section 3.3 of the paper."""


@dataclass(frozen=True, slots=True)
class Integers:
    """q: [N, K], 0 to 2^bits - 1; scales, zeros: [N, G]; g_idx: [K]. All fp32 but for g_idx."""

    q: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor

    def floats(self) -> Tensor:
        """The weights [N, K] that these integers mean."""
        return (self.q - self.zeros[:, self.g_idx]) * self.scales[:, self.g_idx]


def round_to_nearest(weight: Tensor, scheme: Scheme) -> Integers:
    """weight: [N, K] fp32."""
    num_inputs = weight.shape[1]
    g_idx = torch.arange(num_inputs) // scheme.group_len(num_inputs)
    grids = [grid_of(part, scheme) for part in weight.split(scheme.group_len(num_inputs), dim=1)]
    scales, zeros = (torch.stack(values, dim=1) for values in zip(*grids, strict=True))
    q = on_grid(weight, scales[:, g_idx], zeros[:, g_idx], scheme)
    return Integers(q, scales, zeros, g_idx)


def calibrated(weight: Tensor, hessian: Tensor, scheme: Scheme) -> Integers:
    """weight: [N, K] fp32; hessian: [K, K], sums of x x^T over the inputs seen."""
    weight, hessian = weight.clone(), hessian.clone()
    num_inputs = weight.shape[1]
    unseen = hessian.diagonal() == 0
    hessian.diagonal()[unseen] = 1.0
    weight[:, unseen] = 0.0
    order = torch.arange(num_inputs)
    if scheme.has_order:  # the inputs that matter most first, while all others can make up for them
        order = hessian.diagonal().argsort(descending=True)
        weight, hessian = weight[:, order], hessian[order][:, order]
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    found = _in_order(weight, torch.linalg.cholesky(inverse, upper=True), scheme)
    places = order.argsort()
    return Integers(found.q[:, places], found.scales, found.zeros, found.g_idx[places])


def _in_order(weight: Tensor, inverse: Tensor, scheme: Scheme) -> Integers:
    """`inverse`: upper Cholesky factor of H's inverse. Changes `weight`."""
    num_inputs = weight.shape[1]
    length = scheme.group_len(num_inputs)
    q = torch.empty_like(weight)
    grids: list[tuple[Tensor, Tensor]] = []
    for start in range(0, num_inputs, BLOCK):
        end = min(start + BLOCK, num_inputs)
        errors = torch.empty(weight.shape[0], end - start)
        for i in range(start, end):
            if i % length == 0:
                grids.append(grid_of(weight[:, i : i + length], scheme))
            scale, zero = grids[-1]
            q[:, i] = on_grid(weight[:, i], scale, zero, scheme)
            error = (weight[:, i] - (q[:, i] - zero) * scale) / inverse[i, i]
            # Within a group that goes on behind this block its later inputs are not up to date yet;
            # its grid was chosen before, as in the authors' own code.
            weight[:, i:end] -= error[:, None] * inverse[i, i:end]
            errors[:, i - start] = error
        weight[:, end:] -= errors @ inverse[start:end, end:]
    scales, zeros = (torch.stack(values, dim=1) for values in zip(*grids, strict=True))
    return Integers(q, scales, zeros, torch.arange(num_inputs) // length)


def grid_of(part: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point, [N] each, of a group's weights [N, g]. Scales are fp16 values."""
    top = 2**scheme.bits - 1
    if scheme.is_symmetric:
        scale = 2 * part.abs().amax(1) / top
        zero = torch.full_like(scale, (top + 1) // 2)
    else:
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale = (high - low) / top
        zero = -low
    # Stored as fp16: what is rounded to must be what is read.
    scale = scale.clamp(min=torch.finfo(torch.float16).tiny).half().float()
    return scale, zero if scheme.is_symmetric else (zero / scale).round().clamp(0, top)


def on_grid(weight: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    return ((weight / scale).round() + zero).clamp(0, 2**scheme.bits - 1)
