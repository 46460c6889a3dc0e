"""Keys and values as 16-bit integers, in the order their products read them. Knows no operation.

A head of a token is integers with a scale, fp32: x is about integer * scale, and the largest
integer is 8191. Sixteen tokens of one head make a panel:

    keys    [num_blocks, block_size/16, Hk, D/2, 16, 2]: two neighbouring elements of each token
    values  [num_blocks, block_size/16, Hk, D/16, 8, 16, 2]: two neighbouring tokens of each element
    scales  [num_blocks, block_size/16, Hk, 16]

A product with a query, or with the weights of a row, takes two of either at a time (vpmaddwd):
scores of sixteen tokens, and sixteen elements of a result, are sums that no step adds up across
lanes. The torch code is the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS = 16
"""Of a panel."""
LARGEST = 8191
MAX_HEAD_DIM = 256
"""So that sums of products stay below 2^31."""
LEAST = 1e-37
"""What is below has no inverse in fp32: it becomes 0."""


def fits(head_dim: int, block_size: int) -> bool:
    """Whether heads and blocks can be cut into panels."""
    return head_dim % 16 == 0 and head_dim <= MAX_HEAD_DIM and block_size % TOKENS == 0


def shapes(
    num_blocks: int, block_size: int, num_heads: int, head_dim: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of keys, of values, and of the scales of either."""
    panels = num_blocks, block_size // TOKENS, num_heads
    return (
        (*panels, head_dim // 2, TOKENS, 2),
        (*panels, head_dim // 16, 8, 16, 2),
        (*panels, TOKENS),
    )


def integers(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] -> int16 [..., D] and fp32 scales [...]: NaN where something is not finite."""
    x = x.float()
    largest = x.abs().amax(-1)
    scales = torch.where(largest.isinf(), torch.nan, largest / LARGEST)
    factors = torch.where(largest > LEAST, LARGEST / largest, 0.0)
    return (x * factors.unsqueeze(-1)).round().nan_to_num(0.0).to(torch.int16), scales


def key_panels(keys: Tensor) -> Tensor:
    """[num_blocks, block_size, Hk, D] -> panels."""
    tokens: Tensor = keys.unflatten(1, (-1, TOKENS)).unflatten(4, (-1, 2))
    return tokens.permute(0, 1, 3, 4, 2, 5).contiguous()


def value_panels(values: Tensor) -> Tensor:
    """[num_blocks, block_size, Hk, D] -> panels."""
    pairs: Tensor = values.unflatten(1, (-1, TOKENS // 2, 2)).unflatten(5, (-1, 16))
    return pairs.permute(0, 1, 4, 5, 2, 6, 3).contiguous()


def scale_panels(scales: Tensor) -> Tensor:
    """[num_blocks, block_size, Hk] -> panels."""
    tokens: Tensor = scales.unflatten(1, (-1, TOKENS))
    return tokens.transpose(2, 3).contiguous()


def keys_of(panels: Tensor) -> Tensor:
    """Panels -> [num_blocks, block_size, Hk, D]."""
    return panels.permute(0, 1, 4, 2, 3, 5).flatten(4).flatten(1, 2)


def values_of(panels: Tensor) -> Tensor:
    """Panels -> [num_blocks, block_size, Hk, D]."""
    return panels.permute(0, 1, 4, 6, 2, 3, 5).flatten(5).flatten(1, 3)


def scales_of(panels: Tensor) -> Tensor:
    """Panels -> [num_blocks, block_size, Hk]."""
    return panels.transpose(2, 3).flatten(1, 2)
