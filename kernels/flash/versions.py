"""The versions of flash-attn: for which cards each is, and how it is asked for paged attention.

Lengths stay on the device; where a call wants to know the longest, it is told a bound. Knows no
dispatch. Source of the calls: Dao-AILab/flash-attention: hopper/, flash_attn/cute/, flash_attn/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences side by side. `most_queries`, `most_keys`: bounds of what one of them has."""

    block_tables: Tensor
    query_start: Tensor
    context_lens: Tensor
    most_queries: int
    most_keys: int

    def key_start(self) -> Tensor:
        """Where each sequence's keys would begin if they lay side by side: [num_sequences + 1]."""
        start = torch.zeros_like(self.query_start)
        torch.cumsum(self.context_lens, 0, out=start[1:])
        return start


@dataclass(frozen=True, slots=True)
class Version:
    """`attend(module, q, keys, values, batch, scale, sliding_window)`: [num_tokens, heads, dim].

    Cards are told by the first number of their compute capability.
    """

    module: str
    prompts_on: tuple[int, ...]
    decodes_on: tuple[int, ...]
    """Where programs share the keys of one sequence: without that, few decodes are slow."""
    block_unit: int
    """Blocks have so many tokens or a multiple."""
    max_head_dim: int
    attend: Callable[[ModuleType, Tensor, Tensor, Tensor, Batch, float, int], Tensor]

    def is_installed(self) -> bool:
        try:
            return find_spec(self.module) is not None
        except ModuleNotFoundError:  # of the package that it would be in
            return False

    def suits(self, major: int, is_decode: bool, block_size: int) -> bool:
        majors = self.decodes_on if is_decode else self.prompts_on
        return major in majors and block_size % self.block_unit == 0

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float, window: int
    ) -> Tensor:
        return self.attend(import_module(self.module), q, keys, values, batch, scale, window)


def takes(q: Tensor, keys: Tensor, values: Tensor, max_head_dim: int) -> bool:
    """What all flash kernels ask of queries and a cache."""
    head_dim = q.shape[2]
    return (
        len(q) > 0
        and head_dim % 8 == 0
        and head_dim <= max_head_dim
        and keys.dtype is values.dtype is q.dtype
        and q.shape[1] % keys.shape[2] == 0
    )


def _version_2(
    module: ModuleType,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    scale: float,
    sliding_window: int,
) -> Tensor:
    window = (sliding_window - 1, 0) if sliding_window else (-1, -1)
    out: Tensor = module.flash_attn_varlen_func(
        q, keys, values, batch.query_start, batch.key_start(), batch.most_queries,
        batch.most_keys, softmax_scale=scale, causal=True, window_size=window,
        block_table=batch.block_tables,
    )  # fmt: skip
    return out


def _version_3(
    module: ModuleType,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    scale: float,
    sliding_window: int,
) -> Tensor:
    window = (sliding_window - 1, 0) if sliding_window else (-1, -1)
    out: Tensor = module.flash_attn_with_kvcache(
        q, keys, values, cache_seqlens=batch.context_lens, page_table=batch.block_tables,
        cu_seqlens_q=batch.query_start, max_seqlen_q=batch.most_queries, softmax_scale=scale,
        causal=True, window_size=window,
    )  # fmt: skip
    return out


def _version_4(
    module: ModuleType,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    scale: float,
    sliding_window: int,
) -> Tensor:
    window = (sliding_window - 1, 0) if sliding_window else (None, None)
    returned: tuple[Tensor, Tensor | None] = module.flash_attn_varlen_func(
        q, keys, values, cu_seqlens_q=batch.query_start, max_seqlen_q=batch.most_queries,
        max_seqlen_k=batch.most_keys, seqused_k=batch.context_lens,
        page_table=batch.block_tables, softmax_scale=scale, causal=True, window_size=window,
        num_splits=0 if batch.most_queries == 1 else 1,
    )  # fmt: skip
    return returned[0]


VERSIONS = (
    Version("flash_attn_interface", (8, 9), (8, 9), 1, 256, _version_3),
    Version("flash_attn.cute", (9, 10, 11), (10, 11), 1, 128, _version_4),
    Version(
        "flash_attn.flash_attn_interface", (8, 9, 10, 12), (8, 9, 10, 12), 256, 256, _version_2
    ),
)
"""Best first: 3, 4 and 2. Version 4 is found in a package `flash_attn` that need not hold 2."""
