"""packed_linear: a matrix of rows times a weight matrix in panels. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from ..layout_names import PANEL16, PANEL16_INT12
from ..layouts import pack, unpack
from .case import Builder, Case, Cost, Inputs, integer_case, num_bytes


def packed_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, num_outputs: int
) -> torch.Tensor:
    """Return `x @ weight.T + bias`, [T, N], in the dtype of `x`; sums are fp32.

    x: [T, K]; weight: [N, K] in the layout panel16 (see layouts.py); bias: [N] or None; N is
    `num_outputs`; all of one dtype. Or x and bias are bfloat16 and the layout panel16-int12; then
    the native kernels make integers of x too, of 16 bits with a scale for every 128.
    """
    return functional.linear(x, unpack(weight, num_outputs, x.shape[1]).to(x.dtype), bias)


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
                sizes = num_rows, num_outputs, num_inputs
                case = f"qwen2-0.5b-{name}-{num_rows}-rows"
                yield from _in_both(case, *sizes, has_bias=name == "qkv", is_timed=True)
    for num_rows in (1, 2, 3, 5, 6, 7, 9, 13, 17, 31, 33):
        yield from _in_both(f"{num_rows}-rows-of-37-to-5", num_rows, 5, 37, has_bias=True)
    for num_rows in range(1, 8):
        yield from _in_both(f"{num_rows}-rows-of-several-blocks", num_rows, 40, 1301, has_bias=True)
    yield from _in_both("one-by-one", 1, 1, 1)
    yield from _in_both("no-rows", 0, 16, 32, has_bias=True)
    yield from _in_both("uneven", 19, 131, 1000, has_bias=True)
    yield from _in_both("many-rows-of-many", 150, 48, 9001, has_bias=True)
    yield from _in_both("rows-of-very-many", 33, 40, 40001)
    for layout in (PANEL16, PANEL16_INT12):
        yield _case("outliers", _outliers(layout), layout)
        yield _case("strided-rows", _strided(layout), layout)
    yield _case("small-beside-large", _mixed, PANEL16_INT12)
    yield _case("nothing-finite", _not_finite, PANEL16_INT12)


def _in_both(
    name: str,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    has_bias: bool = False,
    is_timed: bool = False,
) -> Iterator[Case]:
    for layout in (PANEL16, PANEL16_INT12):
        build = _plain(num_rows, num_outputs, num_inputs, has_bias, layout)
        yield _case(name, build, layout, is_timed)


def _case(name: str, build: Builder, layout: str, is_timed: bool = False) -> Case:
    return integer_case(name, build, is_timed) if layout != PANEL16 else Case(name, build, is_timed)


def _plain(
    num_rows: int, num_outputs: int, num_inputs: int, has_bias: bool, layout: str
) -> Builder:
    def build(inputs: Inputs) -> tuple[object, ...]:
        weight = inputs.normal(num_outputs, num_inputs, scale=num_inputs**-0.5)
        bias = inputs.normal(num_outputs) if has_bias else None
        return inputs.normal(num_rows, num_inputs), pack(weight, layout), bias, num_outputs

    return build


def _outliers(layout: str) -> Builder:
    def build(inputs: Inputs) -> tuple[object, ...]:
        x = inputs.normal(8, 128)
        x[:, 5] = 500.0
        x[3] = 0.0
        return x, pack(inputs.normal(96, 128, scale=0.1), layout), None, 96

    return build


def _strided(layout: str) -> Builder:
    def build(inputs: Inputs) -> tuple[object, ...]:
        weight = inputs.normal(48, 128, scale=0.1)
        return inputs.normal(4, 200)[:, 8:136], pack(weight, layout), None, 48

    return build


def _mixed(inputs: Inputs) -> tuple[object, ...]:
    """Blocks of rows and of outputs of very different sizes, and nothing at all."""
    x, weight = inputs.normal(13, 512), inputs.normal(40, 512, scale=0.1)
    x[:, :128] *= 1e-3
    x[2], x[5, 128:256] = 1e-33, 0.0
    weight[:20, 256:384] *= 2.0**-100
    weight[7], weight[30:] = 0.0, weight[30:] * 1e-20
    return x, pack(weight, PANEL16_INT12), None, 40


def _not_finite(inputs: Inputs) -> tuple[object, ...]:
    """What is no number spoils its own row and its own output, and nothing else."""
    x, weight = inputs.normal(9, 300), inputs.normal(33, 300, scale=0.1)
    x[1, 299], x[4, 0] = torch.nan, torch.nan
    weight[20, 150] = torch.nan
    return x, pack(weight, PANEL16_INT12), None, 33
