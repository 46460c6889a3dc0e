"""How weight matrices may lie in memory, by name and by size. Knows no torch.

    plain      [N, K], as checkpoints hold it
    panel16    [N/16, K/w, 16, w]: 16 outputs side by side, w weights of each in one 32-bit word
               (two bfloat16 or one float32); what is missing at the edges is zero
    panel16-int12
               [N/16, L], int16: for rows of bfloat16. A panel begins with a byte for each block of
               128 inputs and each output, up to whole lines of 64 bytes; then come words as in
               panel16, two integers each, K up to a multiple of 8. A byte is an exponent as floats
               have it: an integer n stands for n * 2^(byte - 127), or for no number where the byte
               is 255. The largest of a block and output is below 2^11: weights of bfloat16 are
               exact, but for those below 2^-3 of it, which may be off by 2^-11 of it. Four lines of
               16 words lie in three: an int16 of those is 16 times its own integer, and its lowest
               four bits are a part of the fourth line's, the highest in the first
    …-paired   panels of two matrices in turn: gate, up, gate, up
    panel16-int4, …-int8
               [N/16, K/w, 16]: as panel16, but a word holds 8 or 4 weights of one output, lowest
               bits first; beside it scales, perhaps zero points, [N/16, groups, 16], fp32

With bfloat16 a panel's words are what AVX512-BF16 and AMX (VNNI) multiply; AVX-512 makes two floats
of each. AVX2 multiplies pairs of integers faster than floats: 1.6 times, on Zen 3. Memory brings 12
bits a weight in three quarters of the time that 16 take, and few rows leave time to unpack them.
"""

from __future__ import annotations

LAYOUT_VERSION = 1
"""Raised when the same name begins to mean something else."""

PLAIN = "plain"
PANEL16 = "panel16"
PANEL16_INT12 = "panel16-int12"
PAIRED = "-paired"
INT4, INT8 = "panel16-int4", "panel16-int8"
BITS = {INT4: 4, INT8: 8}
PANEL = 16
WORD_BYTES = 4
LINE_BYTES = 64
BLOCK = 128
"""Inputs that share an exponent in panel16-int12."""
INTEGER_BITS = 11
"""Of their magnitudes."""
QUAD, QUAD_LINES = 4, 3
"""Lines of words, and those they lie in."""


def stored_shape(layout: str, num_outputs: int, num_inputs: int, itemsize: int) -> tuple[int, ...]:
    """Of a matrix in `layout`, paired or not, its padding included."""
    if layout == PLAIN:
        return num_outputs, num_inputs
    num_panels = -(-num_outputs // PANEL)
    if layout.removesuffix(PAIRED) == PANEL16_INT12:
        num_lines = -(-num_inputs // (2 * QUAD)) * QUAD_LINES
        return num_panels, (front_bytes_of(num_inputs) + num_lines * LINE_BYTES) // 2
    per_word = WORD_BYTES // itemsize
    return num_panels, -(-num_inputs // per_word), PANEL, per_word


def front_bytes_of(num_inputs: int) -> int:
    """Of a panel16-int12's panel: its exponents, up to a whole line."""
    return -(-(-(-num_inputs // BLOCK) * PANEL) // LINE_BYTES) * LINE_BYTES


def quantized_shapes(
    bits: int, group_size: int, num_outputs: int, num_inputs: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the words, and of the scales or zero points."""
    num_panels = -(-num_outputs // PANEL)
    num_words, num_groups = -(-num_inputs // (32 // bits)), -(-num_inputs // group_size)
    return (num_panels, num_words, PANEL), (num_panels, num_groups, PANEL)
