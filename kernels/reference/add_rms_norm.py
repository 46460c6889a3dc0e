"""add_rms_norm: the residual addition and the norm that follows it. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .case import Builder, Case, Cost, Inputs, num_bytes
from .rms_norm import rms_norm


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add `x` to `residual` in place and return `rms_norm(residual, weight, eps)`.

    x, residual: [T, H]; weight: [H]; all of one dtype. The sum is rounded to the dtype first.
    """
    residual.add_(x)
    return rms_norm(residual, weight, eps)


def cost(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Cost:
    return Cost(4 * num_bytes(x) + num_bytes(weight), 5 * x.numel())


def cases() -> Iterator[Case]:
    for num_rows in (1, 8, 32, 64):
        yield Case(f"qwen2-0.5b-{num_rows}-rows", _plain(num_rows, 896), is_timed=True)
    yield Case("odd-size", _plain(3, 37))
    yield Case("no-rows", _plain(0, 64))
    yield Case("many-rows", _plain(300, 256))
    yield Case("outliers", _outliers)
    yield Case("strided-rows", _strided)


def _plain(num_rows: int, size: int) -> Builder:
    def build(inputs: Inputs) -> tuple[object, ...]:
        x, residual = inputs.normal(num_rows, size), inputs.normal(num_rows, size)
        return x, residual, inputs.normal(size), 1e-6

    return build


def _outliers(inputs: Inputs) -> tuple[object, ...]:
    x, residual = inputs.normal(4, 200), inputs.normal(4, 200)
    residual[:, 7] = 2048.0
    x[2] = -residual[2]
    return x, residual, inputs.normal(200), 1e-5


def _strided(inputs: Inputs) -> tuple[object, ...]:
    x, residual = inputs.normal(4, 96)[:, 16:80], inputs.normal(4, 128)[:, 64:]
    return x, residual, inputs.normal(64), 1e-6
