"""Brings weight matrices into a layout and back. The torch code is the definition.

`pack` uses the native library where it can: a first boot packs a whole model. Knows no model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu import packing
from .layout_names import (
    BLOCK,
    INTEGER_BITS,
    PANEL,
    PANEL16,
    PANEL16_INT12,
    QUAD,
    QUAD_LINES,
    WORD_BYTES,
    front_bytes_of,
)


def pack(weight: Tensor, layout: str = PANEL16) -> Tensor:
    """weight: [N, K] -> its panels in `layout`; for panel16-int12 it must be bfloat16."""
    if packing.accepts(weight, layout):
        return packing.pack(weight, None, layout)
    return packed_by_torch(weight, layout)


def pack_paired(first: Tensor, second: Tensor, layout: str = PANEL16) -> Tensor:
    """Two [N, K], N a multiple of 16 -> their panels in turn: `layout`-paired."""
    if packing.accepts(first, layout) and packing.accepts(second, layout):
        return packing.pack(first, second, layout)
    return packed_by_torch(interleaved(first, second), layout)


def packed_by_torch(weight: Tensor, layout: str = PANEL16) -> Tensor:
    if layout == PANEL16_INT12:
        return _packed_as_integers(weight)
    return _panels(weight, WORD_BYTES // weight.element_size())


def unpack(packed: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """The [N, K] that was packed; of integers, as bfloat16, what they stand for."""
    if packed.dtype is torch.int16:
        return _unpacked_integers(packed, num_outputs, num_inputs)
    return _rows(packed, num_outputs, num_inputs)


def _panels(weight: Tensor, per_word: int) -> Tensor:
    """[N, K] -> [N/16, K/w, 16, w]."""
    num_outputs, num_inputs = weight.shape
    rows, columns = -num_outputs % PANEL, -num_inputs % per_word
    padded = torch.nn.functional.pad(weight, (0, columns, 0, rows))
    panels = padded.view(-1, PANEL, padded.shape[1] // per_word, per_word)
    return panels.transpose(1, 2).contiguous()


def _rows(panels: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    _, num_words, _, per_word = panels.shape
    rows = panels.transpose(1, 2).reshape(-1, num_words * per_word)
    return rows[:num_outputs, :num_inputs].contiguous()


# ---- panel16-int12 ---------------------------------------------------------------------------


def _packed_as_integers(weight: Tensor) -> Tensor:
    num_inputs = weight.shape[1]
    blocks = torch.nn.functional.pad(weight.float(), (0, -num_inputs % BLOCK))
    blocks = blocks.unflatten(1, (-1, BLOCK))
    exponents = _exponents(blocks.abs().amax(-1))
    # As float64: the smallest power of two has an inverse that fp32 lacks.
    integers = (blocks.double() * torch.exp2(127.0 - exponents.double())[..., None]).round()
    integers = torch.where(exponents[..., None] == 255, 0.0, integers).to(torch.int16)
    front = _panels(exponents.to(torch.uint8), 1).flatten(1)
    front = torch.nn.functional.pad(front, (0, front_bytes_of(num_inputs) - front.shape[1]))
    words = _panels(integers.flatten(1)[:, : -(-num_inputs // (2 * QUAD)) * 2 * QUAD], 2)
    return torch.cat((front.view(torch.int16), _in_quads(words.flatten(2)).flatten(1)), dim=1)


def _in_quads(lines: Tensor) -> Tensor:
    """[P, lines, 32] of 12-bit integers -> three quarters of the lines."""
    quads = lines.unflatten(1, (-1, QUAD))
    last = torch.stack([quads[:, :, -1] >> shift & 15 for shift in (8, 4, 0)], dim=2)
    packed: Tensor = quads[:, :, :QUAD_LINES] << 4 | last
    return packed.flatten(1, 2)


def _from_quads(packed: Tensor) -> Tensor:
    """The lines that were packed."""
    quads = packed.unflatten(1, (-1, QUAD_LINES))
    first, second, third = (quads & 15).unbind(2)
    # 16 times the integer, and back, so that its highest bit is the sign.
    last = (first << 12 | second << 8 | third << 4) >> 4
    return torch.cat((quads >> 4, last.unsqueeze(2)), dim=2).flatten(1, 2)


def _exponents(largest: Tensor) -> Tensor:
    """Of the powers of two that make the magnitudes integers below 2^11; 255 for what is none."""
    above = (largest.view(torch.int32) >> 23) + 1
    return torch.where(above == 256, 255, (above - INTEGER_BITS).clamp(min=1))


def _unpacked_integers(packed: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    front_size = front_bytes_of(num_inputs) // 2
    front = packed[:, :front_size].contiguous().view(torch.uint8)
    front = front[:, : -(-num_inputs // BLOCK) * PANEL].unflatten(1, (-1, PANEL, 1))
    exponents = _rows(front, num_outputs, front.shape[1]).int()
    lines = _from_quads(packed[:, front_size:].unflatten(1, (-1, 2 * PANEL)))
    integers = _rows(lines.unflatten(2, (PANEL, 2)), num_outputs, num_inputs)
    powers = (exponents << 23).view(torch.float32)
    return (integers * powers.repeat_interleave(BLOCK, 1)[:, :num_inputs]).bfloat16()


def interleaved(first: Tensor, second: Tensor) -> Tensor:
    """[2 N, K]: 16 rows of the first, 16 of the second, and so on."""
    return torch.stack(
        (first.unflatten(0, (-1, PANEL)), second.unflatten(0, (-1, PANEL))), 1
    ).flatten(0, 2)


def separated(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The two that were interleaved."""
    first, second = weight.view(-1, 2, PANEL, weight.shape[1]).unbind(1)
    return first.flatten(0, 1), second.flatten(0, 1)
