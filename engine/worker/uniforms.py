"""The numbers that decide which tokens are drawn: hashes of seed, sample and position.

So a sequence's tokens depend on these and its logits alone, never on what else is in the batch.
"""

from __future__ import annotations

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: np.ndarray, sample_indices: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[S] in [0, 1), of 53 bits; seeds and indices: uint64, positions: of tokens in an output."""
    with np.errstate(over="ignore"):
        state = splitmix64(seeds ^ splitmix64(sample_indices))
        bits = splitmix64(state + positions.astype(np.uint64) * GOLDEN)
    return (bits >> np.uint64(11)) * 2.0**-53


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Steele, Lea and Flood 2014: a bijective hash of 64 bits. Overflows, as it should."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
