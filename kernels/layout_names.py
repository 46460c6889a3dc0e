"""How weight matrices may lie in memory, by name and by size. Knows no torch.

    plain      [N, K], as checkpoints hold it
    panel16    [N/16, K/w, 16, w]: 16 outputs side by side, w weights of each in one 32-bit word
               (two bfloat16 or one float32); what is missing at the edges is zero
    …-paired   panels of two matrices in turn: gate, up, gate, up
    panel16-int4, …-int8
               [N/16, K/w, 16]: as panel16, but a word holds 8 or 4 weights of one output, lowest
               bits first; beside it scales, perhaps zero points, [N/16, groups, 16], fp32

With bfloat16 a panel's words are what AVX512-BF16 and AMX (VNNI) multiply; AVX2 and AVX-512 make
two floats of each.
"""

from __future__ import annotations

LAYOUT_VERSION = 1
"""Raised when the same name begins to mean something else."""

PLAIN = "plain"
PANEL16 = "panel16"
PAIRED = "-paired"
INT4, INT8 = "panel16-int4", "panel16-int8"
BITS = {INT4: 4, INT8: 8}
PANEL = 16
WORD_BYTES = 4


def stored_shape(layout: str, num_outputs: int, num_inputs: int, itemsize: int) -> tuple[int, ...]:
    """Of a matrix in `layout`, its padding included."""
    if layout == PLAIN:
        return num_outputs, num_inputs
    per_word = WORD_BYTES // itemsize
    return -(-num_outputs // PANEL), -(-num_inputs // per_word), PANEL, per_word


def quantized_shapes(
    bits: int, group_size: int, num_outputs: int, num_inputs: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the words, and of the scales or zero points."""
    num_panels = -(-num_outputs // PANEL)
    num_words, num_groups = -(-num_inputs // (32 // bits)), -(-num_inputs // group_size)
    return (num_panels, num_words, PANEL), (num_panels, num_groups, PANEL)
