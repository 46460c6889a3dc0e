"""packed_linear: a matrix of rows times a weight matrix in panels. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from ..layouts import pack, unpack
from .case import Builder, Case, Cost, Inputs, num_bytes


def packed_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, num_outputs: int
) -> torch.Tensor:
    """Return `x @ weight.T + bias`, [T, N], in the dtype of `x`; sums are fp32.

    x: [T, K]; weight: [N, K] in the layout panel16 (see layouts.py); bias: [N] or None; N is
    `num_outputs`; all of one dtype.
    """
    return functional.linear(x, unpack(weight, num_outputs, x.shape[1]), bias)


def cost(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, num_outputs: int
) -> Cost:
    num_rows, num_inputs = x.shape
    out_bytes = num_rows * num_outputs * x.element_size()
    return Cost(num_bytes(x, weight, bias) + out_bytes, 2 * num_rows * num_inputs * num_outputs)


_QWEN2 = {"qkv": (1152, 896), "o": (896, 896), "down": (896, 4864), "head": (32000, 896)}


def cases() -> Iterator[Case]:
    for name, (num_outputs, num_inputs) in _QWEN2.items():
        for num_rows in (1, 8, 32, 64, 512):
            if num_rows < 512 or name != "head":
                build = _plain(num_rows, num_outputs, num_inputs, has_bias=name == "qkv")
                yield Case(f"qwen2-0.5b-{name}-{num_rows}-rows", build, is_timed=True)
    for num_rows in (1, 2, 3, 5, 6, 7, 9, 13, 17, 31, 33):
        yield Case(f"{num_rows}-rows-of-37-to-5", _plain(num_rows, 5, 37, has_bias=True))
    yield Case("one-by-one", _plain(1, 1, 1, has_bias=False))
    yield Case("no-rows", _plain(0, 16, 32, has_bias=True))
    yield Case("uneven", _plain(19, 131, 1000, has_bias=True))
    yield Case("many-rows-of-many", _plain(150, 48, 9001, has_bias=True))
    yield Case("rows-of-very-many", _plain(33, 40, 40001, has_bias=False))
    yield Case("outliers", _outliers)
    yield Case("strided-rows", _strided)


def _plain(num_rows: int, num_outputs: int, num_inputs: int, has_bias: bool) -> Builder:
    def build(inputs: Inputs) -> tuple[object, ...]:
        weight = inputs.normal(num_outputs, num_inputs, scale=num_inputs**-0.5)
        bias = inputs.normal(num_outputs) if has_bias else None
        return inputs.normal(num_rows, num_inputs), pack(weight), bias, num_outputs

    return build


def _outliers(inputs: Inputs) -> tuple[object, ...]:
    x = inputs.normal(8, 128)
    x[:, 5] = 500.0
    x[3] = 0.0
    return x, pack(inputs.normal(96, 128, scale=0.1)), None, 96


def _strided(inputs: Inputs) -> tuple[object, ...]:
    return inputs.normal(4, 200)[:, 8:136], pack(inputs.normal(48, 128, scale=0.1)), None, 48
