"""packed_embedding: rows of a table in panels, so that a tied head needs no second copy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from ..layouts import pack, unpack
from .case import Builder, Case, Cost, Inputs


def packed_embedding(
    token_ids: torch.Tensor, weight: torch.Tensor, num_outputs: int, num_inputs: int
) -> torch.Tensor:
    """Return rows `token_ids` of the table, [T, K], exactly as they are.

    token_ids: [T] int32; weight: [N, K] in the layout panel16 (see layouts.py); N is
    `num_outputs`, K `num_inputs`.
    """
    return functional.embedding(token_ids, unpack(weight, num_outputs, num_inputs))


def cost(token_ids: torch.Tensor, weight: torch.Tensor, num_outputs: int, num_inputs: int) -> Cost:
    return Cost(2 * token_ids.numel() * num_inputs * weight.element_size(), 0)


def cases() -> Iterator[Case]:
    for num_rows in (1, 32, 512):
        yield Case(f"qwen2-0.5b-{num_rows}-rows", _plain(num_rows, 32000, 896), is_timed=True)
    for num_rows in (0, 1, 5):
        yield Case(f"{num_rows}-rows-of-37", _plain(num_rows, 21, 37))


def _plain(num_rows: int, num_outputs: int, num_inputs: int) -> Builder:
    def build(inputs: Inputs) -> tuple[object, ...]:
        token_ids = inputs.integers(num_outputs, num_rows)
        return token_ids, pack(inputs.normal(num_outputs, num_inputs)), num_outputs, num_inputs

    return build
