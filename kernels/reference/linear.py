"""linear: a matrix of rows times a weight matrix as checkpoints hold it. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from .case import Builder, Case, Cost, Inputs, num_bytes


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `x @ weight.T + bias`, [T, N], in the dtype of `x`; sums are fp32.

    x: [T, K]; weight: [N, K], row-major; bias: [N] or None; all of one dtype.
    """
    return functional.linear(x, weight, bias)


def cost(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Cost:
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0]
    out_bytes = num_rows * num_outputs * x.element_size()
    return Cost(num_bytes(x, weight, bias) + out_bytes, 2 * num_rows * num_inputs * num_outputs)


_QWEN2 = {"qkv": (1152, 896), "o": (896, 896), "gate-up": (9728, 896), "down": (896, 4864)}


def cases() -> Iterator[Case]:
    for name, (num_outputs, num_inputs) in {**_QWEN2, "head": (32000, 896)}.items():
        for num_rows in (1, 8, 32, 64, 256):
            if num_rows < 256 or name != "head":
                build = _plain(num_rows, num_outputs, num_inputs, has_bias=name == "qkv")
                yield Case(f"qwen2-0.5b-{name}-{num_rows}-rows", build, is_timed=True)
    for num_rows in (1, 2, 3, 5, 6, 7, 9, 13, 17, 31, 33):
        yield Case(f"{num_rows}-rows-of-37-to-5", _plain(num_rows, 5, 37, has_bias=True))
    yield Case("one-by-one", _plain(1, 1, 1, has_bias=False))
    yield Case("no-rows", _plain(0, 16, 32, has_bias=True))
    yield Case("uneven", _plain(19, 131, 1000, has_bias=True))
    yield Case("outliers", _outliers)
    yield Case("strided-rows", _strided)


def _plain(num_rows: int, num_outputs: int, num_inputs: int, has_bias: bool) -> Builder:
    def build(inputs: Inputs) -> tuple[object, ...]:
        weight = inputs.normal(num_outputs, num_inputs, scale=num_inputs**-0.5)
        bias = inputs.normal(num_outputs) if has_bias else None
        return inputs.normal(num_rows, num_inputs), weight, bias

    return build


def _outliers(inputs: Inputs) -> tuple[object, ...]:
    x = inputs.normal(8, 128)
    x[:, 5] = 500.0
    x[3] = 0.0
    return x, inputs.normal(96, 128, scale=0.1), None


def _strided(inputs: Inputs) -> tuple[object, ...]:
    return inputs.normal(4, 200)[:, 8:136], inputs.normal(48, 128, scale=0.1), None
