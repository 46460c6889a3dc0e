"""packed_embedding: rows of a table in panels, so that a tied head needs no second copy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from ..layout_names import PANEL16, PANEL16_INT12
from ..layouts import pack, unpack
from .case import Builder, Case, Cost, Inputs, integer_case


def packed_embedding(
    token_ids: torch.Tensor, weight: torch.Tensor, num_outputs: int, num_inputs: int
) -> torch.Tensor:
    """Return rows `token_ids` of the table, [T, K], exactly as they are.

    token_ids: [T] int32; weight: [N, K] in the layout panel16 or panel16-int12 (see layouts.py),
    whose rows are bfloat16; N is `num_outputs`, K `num_inputs`.
    """
    return functional.embedding(token_ids, unpack(weight, num_outputs, num_inputs))


def cost(token_ids: torch.Tensor, weight: torch.Tensor, num_outputs: int, num_inputs: int) -> Cost:
    return Cost(2 * token_ids.numel() * num_inputs * weight.element_size(), 0)


def cases() -> Iterator[Case]:
    for layout in (PANEL16, PANEL16_INT12):
        made = integer_case if layout == PANEL16_INT12 else Case
        for num_rows in (1, 32, 512):
            name = f"qwen2-0.5b-{num_rows}-rows"
            yield made(name, _plain(num_rows, 32000, 896, layout), is_timed=True)
        for num_rows in (0, 1, 5):
            yield made(f"{num_rows}-rows-of-37", _plain(num_rows, 21, 37, layout))
        yield made("uneven", _plain(7, 40, 301, layout))


def _plain(num_rows: int, num_outputs: int, num_inputs: int, layout: str) -> Builder:
    def build(inputs: Inputs) -> tuple[object, ...]:
        token_ids = inputs.integers(num_outputs, num_rows)
        table = pack(inputs.normal(num_outputs, num_inputs), layout)
        return token_ids, table, num_outputs, num_inputs

    return build
