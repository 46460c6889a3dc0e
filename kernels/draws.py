"""How a row of `sample` is to be drawn, as it lies in memory. Knows no requests and no seeds.

numpy alone: whoever fills rows of it need not know torch.
"""

from __future__ import annotations

import numpy as np

DRAW = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("uniform", np.float64),
    ]
)
"""temperature 0: the most likely token, whatever the others say. top_k 0, top_p 1, min_p 0 cut
nothing. uniform: the number in [0, 1) that decides. `Draw` in cpu/src/level.h."""

DRAW_WORDS = DRAW.itemsize // 4
"""Of 32 bits: tensors of draws are int32 [rows, DRAW_WORDS]."""


def as_draws(words: np.ndarray) -> np.ndarray:
    """[rows] of DRAW over the same memory as int32 [rows, DRAW_WORDS]."""
    return words.view(DRAW)[:, 0]
