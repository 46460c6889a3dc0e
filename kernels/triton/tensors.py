"""What the Triton operations ask of their tensors, and where they run. Knows no operation.

A grid depends on shapes alone, never on what is in a tensor, and nothing waits for the host: every
operation can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def supported(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in DTYPES


def has_rows(x: torch.Tensor) -> bool:
    """[rows, size], each row contiguous."""
    return x.ndim == 2 and x.stride(1) == 1 and x.dtype in DTYPES


def has_heads(x: torch.Tensor) -> bool:
    """[rows, heads, size], each row contiguous."""
    return x.ndim == 3 and x.stride()[1:] == (x.shape[2], 1) and x.dtype in DTYPES


def is_float_cache(cache: torch.Tensor, head_dim: int, dtype: torch.dtype) -> bool:
    """Of the rows' dtype, or fp8, which is computed with as that."""
    return any(is_cache(cache, head_dim, kind) for kind in (dtype, torch.float8_e4m3fn))


def is_cache(cache: torch.Tensor, head_dim: int, dtype: torch.dtype) -> bool:
    """[blocks, block_size, heads, head_dim], each block contiguous."""
    _, _, num_heads, size = cache.shape
    inner = (num_heads * size, size, 1)
    return size == head_dim and cache.stride()[1:] == inner and cache.dtype is dtype
