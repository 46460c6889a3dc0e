"""quantized_linear: a matrix of rows times one of int4 or int8 weights. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..quantized import pack_groups, pack_words, unpack_groups, unpack_words
from .case import Builder, Case, Cost, Inputs, num_bytes


def quantized_linear(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    num_outputs: int,
) -> torch.Tensor:
    """Return `x[:, order] @ ((q - z) * scale).T + bias`, [T, N], in x's dtype; sums are fp32.

    x: [T, K]; words: q [N, K] in panels, int32 [N/16, K/w, 16] (see kernels/quantized.py); scales,
    zeros: fp32 [N/16, G, 16], G groups of `group_size` inputs, the last perhaps shorter; without
    zeros z is 2^(bits - 1); order: int32 [K] or None; bias: [N] in the dtype of `x`, or None; N is
    `num_outputs`, bits 4 or 8.
    """
    num_inputs = x.shape[1]
    groups = torch.arange(num_inputs, device=x.device) // group_size
    q = unpack_words(words, bits, num_outputs, num_inputs).float()
    z = 2.0 ** (bits - 1) if zeros is None else unpack_groups(zeros, num_outputs)[:, groups]
    weight = (q - z) * unpack_groups(scales, num_outputs)[:, groups]
    inputs = x.float() if order is None else x.float()[:, order.long()]
    out = inputs @ weight.T
    return (out if bias is None else out + bias.float()).to(x.dtype)


def cost(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    num_outputs: int,
) -> Cost:
    num_rows, num_inputs = x.shape
    out_bytes = num_rows * num_outputs * x.element_size()
    moved = num_bytes(x, words, scales, zeros, order, bias)
    return Cost(moved + out_bytes, 2 * num_rows * num_inputs * num_outputs)


_QWEN2 = {"qkv": (1152, 896), "o": (896, 896), "gate-up": (9728, 896), "down": (896, 4864)}


def cases() -> Iterator[Case]:
    for name, (num_outputs, num_inputs) in _QWEN2.items():
        for bits in (4, 8):
            for num_rows in (1, 8, 32, 512):
                if num_rows < 512 or name == "qkv":
                    build = _case(num_rows, num_outputs, num_inputs, bits, has_bias=name == "qkv")
                    title = f"qwen2-0.5b-{name}-int{bits}-{num_rows}-rows"
                    yield Case(title, build, is_timed=True)
    for bits in (4, 8):
        for num_rows in (0, 1, 3, 5, 9, 67):
            yield Case(
                f"int{bits}-{num_rows}-rows", _case(num_rows, 37, 100, bits, 32, has_zeros=True)
            )
        yield Case(f"int{bits}-ordered", _case(7, 48, 256, bits, 64, has_order=True))
        yield Case(
            f"int{bits}-one-group", _case(5, 33, 96, bits, 96, has_zeros=True, has_bias=True)
        )
        yield Case(f"int{bits}-one-by-one", _case(1, 1, 1, bits, 1))
        yield Case(f"int{bits}-outliers", _outliers(bits))
    yield Case("strided-rows", _strided)


def _case(
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    bits: int,
    group_size: int = 128,
    *,
    has_zeros: bool = False,
    has_order: bool = False,
    has_bias: bool = False,
) -> Builder:
    def build(inputs: Inputs) -> tuple[object, ...]:
        num_groups = -(-num_inputs // group_size)
        q = inputs.integers(1 << bits, num_outputs, num_inputs)
        scales = _scales(inputs, bits, num_outputs, num_groups, num_inputs)
        # As v1 checkpoints have them, up to one more than q can be.
        zeros = inputs.integers((1 << bits) + 1, num_outputs, num_groups) if has_zeros else None
        order = inputs.permutation(num_inputs) if has_order else None
        bias = inputs.normal(num_outputs) if has_bias else None
        packed = None if zeros is None else pack_groups(zeros)
        x = inputs.normal(num_rows, num_inputs)
        groups = pack_groups(scales)
        return x, pack_words(q, bits), groups, packed, order, bias, bits, group_size, num_outputs

    return build


def _scales(
    inputs: Inputs, bits: int, num_outputs: int, num_groups: int, num_inputs: int
) -> torch.Tensor:
    """Such that outputs are about as large as inputs."""
    size = 2.0 ** (1 - bits) * num_inputs**-0.5
    spread = inputs.normal(num_outputs, num_groups).float().abs() + 0.1
    return spread.mul(size)


def _outliers(bits: int) -> Builder:
    def build(inputs: Inputs) -> tuple[object, ...]:
        x, *rest = _case(8, 96, 128, bits, 32, has_zeros=True)(inputs)
        assert isinstance(x, torch.Tensor)
        x[:, 5] = 50.0
        x[3] = 0.0
        return x, *rest

    return build


def _strided(inputs: Inputs) -> tuple[object, ...]:
    _, *rest = _case(4, 48, 128, 4, 32)(inputs)
    return inputs.normal(4, 200)[:, 8:136], *rest
