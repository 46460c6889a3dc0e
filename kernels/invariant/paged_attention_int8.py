"""paged_attention_int8 in Triton, each row by the same program whatever else is in the batch.

Knows no model; kernels/reference says what it computes.
"""

from __future__ import annotations

import torch

from ..triton.paged_attention import attend
from ..triton.paged_attention_int8 import accepts, supported

__all__ = ["accepts", "paged_attention_int8", "supported"]


def paged_attention_int8(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int,
) -> torch.Tensor:
    lists = block_tables, query_start, context_lens
    return attend(
        q, k_cache, v_cache, (k_scales, v_scales), lists, scale, sliding_window, is_invariant=True
    )
