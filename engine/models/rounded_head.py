"""The matrix of a model's last product, rounded to int8 when it is packed: an option of the server.

One sequence reads all of it for each token, a quarter of what an int4 model of small size reads.
Symmetric, to the nearest, a scale for each output and 128 inputs. Knows torch; knows no files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.quantized import pack_groups, pack_words
from .quantization import ROUNDED_HEAD

OUTPUTS_AT_ONCE = 4096
"""In fp32: a vocabulary is long."""


def rounded(role: str, weight: Tensor) -> Tensor:
    """weight: [N, K] floats -> its words or its scales, in panels."""
    pieces = [_rounded(role, some.float()) for some in weight.split(OUTPUTS_AT_ONCE)]
    return torch.cat(pieces)


def _rounded(role: str, weight: Tensor) -> Tensor:
    size = ROUNDED_HEAD.group_len(weight.shape[1])
    groups = weight.split(size, dim=1)
    scales = torch.stack([group.abs().amax(1) / 127 for group in groups], dim=1)
    if role == "scales":
        return pack_groups(scales)
    # A group of zeros: whatever it is divided by.
    divisors = scales.clamp(min=torch.finfo(torch.float32).tiny)
    parts = [group / divisors[:, [i]] for i, group in enumerate(groups)]
    return pack_words(torch.cat(parts, dim=1).round().clamp(-127, 127) + 128, 8)
