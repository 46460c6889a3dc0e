"""How a prompt is cut into rows: as the step has room, or always at the same places.

Rows of another length are computed in another order, and their last bits differ; so may, now and
then, a token. Cut at multiples of `size` a prompt is computed in the same rows whatever else runs.
Then also what may be shared ends there: a block is the same for everybody who has its tokens only
if it came out of a whole row. Knows numbers of tokens.
"""

from __future__ import annotations

from .errors import ConfigError

LARGEST = 512
"""Rows for which the weights are read once are long enough by then."""


class Chunks:
    """`size`: a multiple of the block size; 0: as the step has room."""

    def __init__(self, size: int, block_size: int) -> None:
        self._size = size
        self._block_size = block_size

    @property
    def are_fixed(self) -> bool:
        return self._size > 0

    def num_tokens(self, start: int, num_uncomputed: int, budget: int) -> int:
        """Of the row that begins at `start`; 0: this step has no room for it."""
        if not self._size:
            return min(num_uncomputed, budget)
        wanted = min(num_uncomputed, self._size - start % self._size)
        return wanted if wanted <= budget else 0

    def num_shared_blocks(self, num_tokens: int) -> int:
        """Full blocks of a prompt's first `num_tokens` that others may have."""
        unit = self._size or self._block_size
        return num_tokens // unit * unit // self._block_size


def fixed_chunks(max_num_seqs: int, max_batched_tokens: int, block_size: int) -> Chunks:
    """As large as always find room beside decodes. Raises ConfigError."""
    room = max_batched_tokens - max_num_seqs
    size = min(LARGEST, room) // block_size * block_size
    if size <= 0:
        raise ConfigError(
            f"deterministic: max_batched_tokens is {max_batched_tokens}: it must be at least "
            f"{max_num_seqs + block_size}, max_num_seqs ({max_num_seqs}) and a block "
            f"({block_size}), so that a row of a prompt finds room beside all decodes"
        )
    return Chunks(size, block_size)
