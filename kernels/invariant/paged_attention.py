"""paged_attention in Triton, each row by the same program whatever else is in the batch.

Knows no model; kernels/reference says what it computes.
"""

from __future__ import annotations

import torch

from ..triton.paged_attention import accepts, attend, supported

__all__ = ["accepts", "paged_attention", "supported"]


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int,
) -> torch.Tensor:
    lists = block_tables, query_start, context_lens
    return attend(q, k_cache, v_cache, None, lists, scale, sliding_window, is_invariant=True)
