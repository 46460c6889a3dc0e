"""rms_norm: root-mean-square normalisation over the last dimension. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .case import Builder, Case, Cost, Inputs, num_bytes


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return `weight * (x / sqrt(mean(x^2) + eps))`, contiguous, in the dtype of `x`.

    x: [..., H], any strides with the last dimension contiguous; weight: [H], same dtype.
    The mean and the quotient are fp32; the quotient is rounded to the dtype before it meets the
    weight, as transformers' LlamaRMSNorm does. Source: arXiv:1910.07467.
    """
    values = x.float()
    scale = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (values * scale).to(x.dtype).contiguous()


def cost(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Cost:
    return Cost(2 * num_bytes(x) + num_bytes(weight), 4 * x.numel())


def cases() -> Iterator[Case]:
    for num_rows in (1, 8, 32, 64):
        yield Case(f"qwen2-0.5b-{num_rows}-rows", _plain(num_rows, 896), is_timed=True)
    yield Case("odd-size", _plain(3, 37))
    yield Case("one-element", _plain(2, 1))
    yield Case("no-rows", _plain(0, 64))
    yield Case("many-rows", _plain(300, 256))
    yield Case("outliers", _outliers)
    yield Case("zeros", _zeros)
    yield Case("heads-of-a-strided-view", _heads)


def _plain(num_rows: int, size: int) -> Builder:
    def build(inputs: Inputs) -> tuple[object, ...]:
        return inputs.normal(num_rows, size), inputs.normal(size), 1e-6

    return build


def _outliers(inputs: Inputs) -> tuple[object, ...]:
    x = inputs.normal(4, 200)
    x[:, 7] = 3000.0
    x[1] *= 1e-4
    return x, inputs.normal(200), 1e-5


def _zeros(inputs: Inputs) -> tuple[object, ...]:
    return inputs.normal(2, 96) * 0, inputs.normal(96), 1e-6


def _heads(inputs: Inputs) -> tuple[object, ...]:
    qkv = inputs.normal(5, 8 * 32)
    return qkv[:, 64:192].view(5, 4, 32), inputs.normal(32), 1e-6
