"""How much a program of attention takes at a time: what is tuned for a device, and nothing else.

`bench/gpu.py --only tiles` times the candidates. No device has been asked yet. Knows no Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True, slots=True)
class Tiles:
    """`rows`: queries times heads of a group, at least; `keys`: of one step of the loop over them.

    Both are powers of two, of which tensor cores want 16 at least.
    """

    rows: int
    keys: int
    num_warps: int = 4
    num_stages: int = 3


PROMPTS = Tiles(rows=64, keys=32)
DECODES = Tiles(rows=16, keys=32)
"""Rows beyond those of a group would be empty."""


def candidates(is_decode: bool) -> Iterator[Tiles]:
    """Likely ones first: a search may have to end early."""
    rows = (DECODES.rows,) if is_decode else (64, 128)
    warps = (4, 2, 8) if is_decode else (4, 8)
    for num_stages, num_warps, keys, num_rows in product((3, 2, 4), warps, (64, 32, 128), rows):
        yield Tiles(num_rows, keys, num_warps, num_stages)
