"""Brings weight matrices into a layout and back. The torch code is the definition.

`pack` uses the native library where it can: a first boot packs a whole model. Knows no model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu import packing
from .layout_names import PANEL, WORD_BYTES


def pack(weight: Tensor) -> Tensor:
    """weight: [N, K] -> [N/16, K/w, 16, w], the layout panel16."""
    return packing.pack(weight, None) if packing.accepts(weight) else packed_by_torch(weight)


def pack_paired(first: Tensor, second: Tensor) -> Tensor:
    """Two [N, K], N a multiple of 16 -> their panels in turn: panel16-paired."""
    if packing.accepts(first) and packing.accepts(second):
        return packing.pack(first, second)
    return packed_by_torch(interleaved(first, second))


def packed_by_torch(weight: Tensor) -> Tensor:
    num_outputs, num_inputs = weight.shape
    per_word = WORD_BYTES // weight.element_size()
    rows, columns = -num_outputs % PANEL, -num_inputs % per_word
    padded = torch.nn.functional.pad(weight, (0, columns, 0, rows))
    panels = padded.view(-1, PANEL, padded.shape[1] // per_word, per_word)
    return panels.transpose(1, 2).contiguous()


def unpack(packed: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """The [N, K] that was packed."""
    _, num_words, _, per_word = packed.shape
    rows = packed.transpose(1, 2).reshape(-1, num_words * per_word)
    return rows[:num_outputs, :num_inputs].contiguous()


def interleaved(first: Tensor, second: Tensor) -> Tensor:
    """[2 N, K]: 16 rows of the first, 16 of the second, and so on."""
    return torch.stack(
        (first.unflatten(0, (-1, PANEL)), second.unflatten(0, (-1, PANEL))), 1
    ).flatten(0, 2)


def separated(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The two that were interleaved."""
    first, second = weight.view(-1, 2, PANEL, weight.shape[1]).unbind(1)
    return first.flatten(0, 1), second.flatten(0, 1)
