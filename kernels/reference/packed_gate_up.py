"""packed_gate_up: both halves of a gated layer from one pass over their panels. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from ..layout_names import PANEL, PANEL16, PANEL16_INT12
from ..layouts import pack_paired, separated, unpack
from .case import Builder, Case, Cost, Inputs, integer_case, num_bytes


def packed_gate_up(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `silu(x @ gate.T) * (x @ up.T)`, [T, N], in the dtype of `x`; sums are fp32.

    x: [T, K]; weight: gate and up, [N, K] each, N a multiple of 16, in the layout panel16-paired
    or panel16-int12-paired (see layouts.py, and packed_linear).
    """
    gate, up = separated(unpack(weight, weight.shape[0] * PANEL, x.shape[1]).to(x.dtype))
    return functional.silu(functional.linear(x, gate)) * functional.linear(x, up)


def cost(x: torch.Tensor, weight: torch.Tensor) -> Cost:
    out_bytes = x.shape[0] * weight.shape[0] * PANEL // 2 * x.element_size()
    return Cost(num_bytes(x, weight) + out_bytes, 2 * x.numel() * weight.shape[0] * PANEL)


def cases() -> Iterator[Case]:
    for layout in (PANEL16, PANEL16_INT12):
        made = integer_case if layout == PANEL16_INT12 else Case
        for num_rows in (1, 8, 32, 64, 512):
            name = f"qwen2-0.5b-{num_rows}-rows"
            yield made(name, _plain(num_rows, 4864, 896, layout), is_timed=True)
        for num_rows in (1, 2, 5, 6, 7, 13, 40):
            yield made(f"{num_rows}-rows-of-37-to-48", _plain(num_rows, 48, 37, layout))
        yield made("no-rows", _plain(0, 16, 32, layout))
        yield made("one-panel", _plain(3, 16, 64, layout))
        yield made("many-rows-of-many", _plain(70, 32, 9001, layout))
        yield made("outliers", _outliers(layout))


def _plain(num_rows: int, num_outputs: int, num_inputs: int, layout: str) -> Builder:
    def build(inputs: Inputs) -> tuple[object, ...]:
        scale = num_inputs**-0.5
        gate, up = (inputs.normal(num_outputs, num_inputs, scale=scale) for _ in range(2))
        return inputs.normal(num_rows, num_inputs), pack_paired(gate, up, layout)

    return build


def _outliers(layout: str) -> Builder:
    def build(inputs: Inputs) -> tuple[object, ...]:
        x = inputs.normal(8, 128)
        x[:, 5] = 100.0
        x[3] = 0.0
        gate, up = (inputs.normal(32, 128, scale=0.1) for _ in range(2))
        return x, pack_paired(gate, up, layout)

    return build
