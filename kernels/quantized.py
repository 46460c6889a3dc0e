"""Integer weights into panels and back. The torch code is the definition. Knows no model.

A quantised matrix is integers q [N, K] of 4 or 8 bits; a scale, and perhaps a zero point, for each
output and each group of inputs, [N, G]; and perhaps an order, [K]: column i of the matrix takes
input order[i]. A weight is (q - z) * scale; without zero points z is 2^(bits - 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout_names import PANEL


def pack_words(q: Tensor, bits: int) -> Tensor:
    """q: [N, K], 0 to 2^bits - 1 -> int32 [N/16, K/w, 16], the layout panel16-int4 or -int8."""
    num_outputs, num_inputs = q.shape
    per_word = 32 // bits
    rows, columns = -num_outputs % PANEL, -num_inputs % per_word
    padded = torch.nn.functional.pad(q.to(torch.int64), (0, columns, 0, rows))
    fields = padded.view(-1, PANEL, padded.shape[1] // per_word, per_word)
    words = (fields << shifts(bits)).sum(-1).transpose(1, 2)
    # As int32 the highest bit is a sign.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


def unpack_words(words: Tensor, bits: int, num_outputs: int, num_inputs: int) -> Tensor:
    """The q [N, K] that was packed, int32."""
    # The shift of an int32 copies its sign: mask after it.
    fields = (words.unsqueeze(-1) >> shifts(bits).to(words.dtype)) & ((1 << bits) - 1)
    rows = fields.transpose(1, 2).reshape(words.shape[0] * PANEL, -1)
    return rows[:num_outputs, :num_inputs].contiguous()


def pack_groups(values: Tensor) -> Tensor:
    """Scales or zero points: [N, G] -> fp32 [N/16, G, 16]; those of missing outputs are 0."""
    padded = torch.nn.functional.pad(values.float(), (0, 0, 0, -values.shape[0] % PANEL))
    return padded.view(-1, PANEL, values.shape[1]).transpose(1, 2).contiguous()


def unpack_groups(packed: Tensor, num_outputs: int) -> Tensor:
    """The [N, G] that was packed."""
    return packed.transpose(1, 2).reshape(-1, packed.shape[1])[:num_outputs]


def join_fields(fields: Tensor, bits: int) -> Tensor:
    """[R, C] -> int32 [R * bits / 32, C]: consecutive rows into words, lowest bits first."""
    parts = fields.long().unflatten(0, (-1, 32 // bits)) << shifts(bits)[:, None]
    whole = parts.sum(1)
    # As int32 the highest bit is a sign.
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)


def shifts(bits: int) -> Tensor:
    """Of the fields of a word."""
    return torch.arange(0, 32, bits)
