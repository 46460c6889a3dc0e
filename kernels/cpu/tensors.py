"""What the native operations ask of their tensors. Knows no operation.

Whatever an operation does not accept goes to the next implementation, in the end to the reference,
which also says what is wrong with arguments that are no good at all. These checks run on every
call, so they read as few attributes as they can: each costs some fifty nanoseconds.
"""

from __future__ import annotations

import torch

from .. import cache_panels
from ..layout_names import PANEL16, PANEL16_INT12, stored_shape
from . import native

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
"""As `DType` in src/level.h."""

WEIGHT_CODES = {**DTYPE_CODES, torch.int16: 2}
"""Of packed weights: with int16 go rows and results of bfloat16."""

CACHE_FORMAT = "4P8q"


def supported(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype in DTYPE_CODES and native.library() is not None


def has_rows(x: torch.Tensor) -> bool:
    """[rows, size], each row contiguous."""
    return x.ndim == 2 and x.stride()[1] == 1 and x.dtype in DTYPE_CODES


def has_heads(x: torch.Tensor) -> bool:
    """[rows, heads, size], each row contiguous."""
    return x.ndim == 3 and x.stride()[1:] == (x.shape[2], 1) and x.dtype in DTYPE_CODES


def is_vector(x: torch.Tensor, size: int, dtype: torch.dtype) -> bool:
    return x.shape == (size,) and x.is_contiguous() and x.dtype is dtype


def is_cache(cache: torch.Tensor, head_dim: int, dtype: torch.dtype) -> bool:
    """[blocks, block_size, heads, head_dim], each block contiguous."""
    _, _, num_heads, size = cache.shape
    inner = (num_heads * size, size, 1)
    return size == head_dim and cache.stride()[1:] == inner and cache.dtype is dtype


def has_scales(cache: torch.Tensor, scales: torch.Tensor) -> bool:
    """Of a cache of int8: [blocks, block_size, heads], each block contiguous."""
    inner = (scales.shape[2], 1)
    return (
        scales.shape == cache.shape[:3]
        and scales.stride()[1:] == inner
        and scales.dtype is torch.float32
    )


def cache_fields(
    k: torch.Tensor, v: torch.Tensor, scales: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[int, ...]:
    """PagedCache in src/level.h, as CACHE_FORMAT packs it."""
    pointers = k.data_ptr(), v.data_ptr()
    sizes = *k.shape, k.stride()[0], v.stride()[0]
    if scales is None:
        return *pointers, 0, 0, *sizes, 0, 0
    k_scales, v_scales = scales
    strides = k_scales.stride()[0], v_scales.stride()[0]
    return *pointers, k_scales.data_ptr(), v_scales.data_ptr(), *sizes, *strides


def are_panels(
    k: torch.Tensor,
    v: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    head_dim: int,
) -> bool:
    """Keys, values and scales as cache_panels.py has them, all contiguous."""
    num_blocks, num_panels, num_heads = k.shape[:3]
    block_size = num_panels * cache_panels.TOKENS
    if not cache_panels.fits(head_dim, block_size):
        return False
    keys, values, scales = cache_panels.shapes(num_blocks, block_size, num_heads, head_dim)
    return (
        k.dtype is v.dtype is torch.int16
        and k_scales.dtype is v_scales.dtype is torch.float32
        and (k.shape, v.shape, k_scales.shape, v_scales.shape) == (keys, values, scales, scales)
        and all(t.is_contiguous() for t in (k, v, k_scales, v_scales))
    )


def panel_fields(
    k: torch.Tensor, v: torch.Tensor, k_scales: torch.Tensor, v_scales: torch.Tensor
) -> tuple[int, ...]:
    """Of panels, as cache_fields."""
    num_blocks, num_panels, num_heads, num_words, num_tokens, _ = k.shape
    block_size, head_dim = num_panels * num_tokens, 2 * num_words
    pointers = k.data_ptr(), v.data_ptr(), k_scales.data_ptr(), v_scales.data_ptr()
    num_rows = block_size * num_heads
    strides = num_rows * head_dim, num_rows * head_dim, num_rows, num_rows
    return *pointers, num_blocks, block_size, num_heads, head_dim, *strides


def is_panels(weight: torch.Tensor, num_outputs: int, num_inputs: int) -> bool:
    """[N, K] in the layout panel16, or panel16-int12 by its dtype."""
    layout = PANEL16_INT12 if weight.dtype is torch.int16 else PANEL16
    shape = stored_shape(layout, num_outputs, num_inputs, weight.element_size())
    return weight.shape == shape and weight.is_contiguous()


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether packed weights of this dtype multiply such rows."""
    return weight.dtype is x.dtype or (weight.dtype, x.dtype) == (torch.int16, torch.bfloat16)
