"""GPTQ tensors into panels: exactly the integers, scales and zero points that the files hold.

The formula of GPTQModel and AutoGPTQ, W[k, n] = scales[g, n] (q[k, n] - z[g, n]), with z stored as
z - 1 in format v1. Knows torch, and the layouts; knows no files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.layout_names import PANEL
from ...kernels.quantized import pack_groups, pack_words, shifts
from ..errors import CheckpointError, UnsupportedModel
from .quantization import Scheme

SYMMETRIC_WORDS = {
    (4, True): 0x77777777,
    (4, False): 0x88888888,
    (8, True): 0x7F7F7F7F,
    (8, False): 0x80808080,
}
"""qzeros of a symmetric file, by bits and whether the format is v1."""
OUTPUTS_AT_ONCE = 512
"""Of an ordered matrix, which has to be taken apart: memory stays small."""


def words(parts: list[Tensor], order: Tensor | None, scheme: Scheme) -> Tensor:
    """qweight [K/w, N] of parts that lie one below the other -> panels; `order` as `order_of`."""
    stack = torch.cat(parts, dim=1)
    if order is not None:
        return _ordered_words(stack, order, scheme.bits)
    padded = torch.nn.functional.pad(stack, (0, -stack.shape[1] % PANEL))
    return padded.view(stack.shape[0], -1, PANEL).transpose(0, 1).contiguous()


def _ordered_words(stack: Tensor, order: Tensor, bits: int) -> Tensor:
    pieces = []
    for some in stack.split(OUTPUTS_AT_ONCE, dim=1):
        fields = (some.unsqueeze(1) >> shifts(bits).to(torch.int32)[:, None]) & ((1 << bits) - 1)
        q = fields.reshape(-1, some.shape[1])[order.long()]
        pieces.append(pack_words(q.T, bits))
    return torch.cat(pieces)


def scales(parts: list[Tensor]) -> Tensor:
    """[G, N] of each part -> fp32 panels."""
    return pack_groups(torch.cat(parts, dim=1).T)


def zeros(parts: list[Tensor], scheme: Scheme) -> Tensor:
    """qzeros [G, N/w] of each part -> fp32 panels of the true zero points."""
    mask = (1 << scheme.bits) - 1
    each = []
    for part in parts:
        z = (part.unsqueeze(-1) >> shifts(scheme.bits).to(torch.int32)) & mask
        # Field by field: one added to the word would carry into its neighbour. A true zero of 0 is
        # stored as all ones.
        each.append((z.flatten(1) + int(scheme.adds_one)) & mask)
    return pack_groups(torch.cat(each, dim=1).T)


def check_symmetric(module: str, qzeros: Tensor, scheme: Scheme) -> None:
    """Raises CheckpointError where a symmetric file's zero points are not the middle.

    They are not needed; but where they are others, the file is not what it says.
    """
    wanted = SYMMETRIC_WORDS[scheme.bits, scheme.adds_one]
    found = {int(word) & 0xFFFFFFFF for word in qzeros.unique().tolist()}
    if found == {wanted}:
        return
    other = SYMMETRIC_WORDS[scheme.bits, not scheme.adds_one]
    if found == {other}:
        labels = ("gptq", "gptq_v2") if scheme.adds_one else ("gptq_v2", "gptq")
        raise CheckpointError(
            f"{module}.qzeros are those of format {labels[1]}, but checkpoint_format says "
            f"{labels[0]}; correct it in the configuration"
        )
    raise CheckpointError(
        f"{module}.qzeros hold other zero points than a symmetric file has; sym should be false"
    )


def order_of(module: str, g_idx: Tensor, scheme: Scheme) -> Tensor | None:
    """int32 [K]: which input each column takes so that groups lie together; None: they do already.

    Raises CheckpointError where g_idx is not what the configuration says of it.
    """
    num_inputs = len(g_idx)
    natural = torch.arange(num_inputs) // scheme.group_len(num_inputs)
    if not scheme.has_order:
        if scheme.group_size and not torch.equal(g_idx.long(), natural):
            raise CheckpointError(f"{module}.g_idx is not in order, but desc_act is false")
        return None
    order = torch.argsort(g_idx.long(), stable=True)
    if not torch.equal(g_idx.long()[order], natural):
        raise CheckpointError(
            f"{module}.g_idx does not put {scheme.group_size} inputs into each group"
        )
    return order.to(torch.int32)


def common_order(found: dict[str, Tensor], scheme: Scheme) -> Tensor | None:
    """Of matrices that are computed together, by the g_idx of each that has one.

    Raises UnsupportedModel where theirs differ.
    """
    first, order = "", None
    for module, g_idx in found.items():
        other = order_of(module, g_idx, scheme)
        if first and other is not None and order is not None and not torch.equal(order, other):
            raise UnsupportedModel(
                f"{first} and {module} order their inputs differently (desc_act): they are "
                "computed together, which would not be exact"
            )
        first, order = module, other
    return order
