"""Quantised tensors as AWQ and compressed-tensors store them, in GPTQ's form: no value changes.

    AWQ, version gemm, as AutoAWQ writes it (awq/modules/linear/gemm.py)
        qweight  int32 [K, N/8]   along N, in the order of AWQ_ORDER
        qzeros   int32 [G, N/8]   the same; what is stored is the zero point
        scales         [G, N]
    pack-quantized of compressed-tensors, as llm-compressor writes it (its pack_to_int32)
        weight_packed      int32 [N, K * bits / 32]   along K, lowest bits first
        weight_zero_point  int32 [N * bits / 32, G]   along N; absent where symmetric
        weight_scale             [N, G]
        weight_g_idx       int32 [K]                  only with an order of activations

The second is GPTQ's, format v2, transposed. Knows torch; knows no files and no layouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.quantized import join_fields, shifts
from .quantization import AWQ, GPTQ, Scheme

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a word's eight outputs lies in its lowest four bits, in the next, and so on."""
INPUTS_AT_ONCE = 512


def as_gptq(part: str, tensor: Tensor, scheme: Scheme) -> Tensor:
    """`tensor`, which is what GPTQ calls `part`."""
    if scheme.stored == GPTQ or part == "g_idx":
        return tensor
    if scheme.stored == AWQ:
        return _from_awq(part, tensor)
    return tensor.T


def _from_awq(part: str, tensor: Tensor) -> Tensor:
    if part == "scales":
        return tensor
    if part == "qzeros":
        return join_fields(_awq_fields(tensor).T, 4).T
    return torch.cat([join_fields(_awq_fields(some), 4) for some in tensor.split(INPUTS_AT_ONCE)])


def _awq_fields(words: Tensor) -> Tensor:
    """[R, C] -> int64 [R, 8 C]."""
    mixed = (words.long().unsqueeze(-1) >> shifts(4)) & 0xF
    places = torch.tensor(AWQ_ORDER).argsort()
    return mixed[..., places].flatten(1)
