"""silu_mul: the gated activation of a SwiGLU feed-forward layer. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from .case import Builder, Case, Cost, Inputs, num_bytes


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up`, [T, I] contiguous, of gate_up [T, 2 I] = gate beside up.

    silu(x) = x / (1 + exp(-x)) is computed in fp32 and rounded to the dtype before the product,
    as transformers does. Source: arXiv:2002.05202.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def cost(gate_up: torch.Tensor) -> Cost:
    return Cost(num_bytes(gate_up) * 3 // 2, 5 * gate_up.numel() // 2)


def cases() -> Iterator[Case]:
    for num_rows in (1, 8, 32, 64):
        yield Case(f"qwen2-0.5b-{num_rows}-rows", _plain(num_rows, 4864), is_timed=True)
    yield Case("odd-size", _plain(3, 37))
    yield Case("no-rows", _plain(0, 64))
    yield Case("outliers", _outliers)
    yield Case("strided-rows", lambda inputs: (inputs.normal(4, 200)[:, 8:168],))


def _plain(num_rows: int, size: int) -> Builder:
    return lambda inputs: (inputs.normal(num_rows, 2 * size, scale=3.0),)


def _outliers(inputs: Inputs) -> tuple[object, ...]:
    gate_up = inputs.normal(4, 2 * 40)
    gate_up[:, :8] = torch.tensor([-1e4, -200.0, -88.5, -20.0, 0.0, 20.0, 200.0, 1e4])
    return (gate_up,)
