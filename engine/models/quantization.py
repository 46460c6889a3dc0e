"""How a checkpoint's matrices are quantised, and the tensors that hold them. Knows no torch.

GPTQ, as AutoGPTQ and GPTQModel write it: of a matrix [K, N] (inputs, outputs)

    qweight  int32 [K * bits / 32, N]   along K, lowest bits first
    qzeros   int32 [G, N * bits / 32]   along N; format gptq (v1) stores z - 1, gptq_v2 stores z
    scales         [G, N]
    g_idx    int32 [K]                  which group each input belongs to; may be absent

Others store the same in other ways (stored.py). Which modules are quantised is seen by their
tensors and not believed of the configuration, which is read elsewhere (quantization_config.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import CheckpointError

GPTQ, AWQ, PACKED = "gptq", "awq", "pack-quantized"
BITS = (4, 8)
FORMATS = ("gptq", "gptq_v2")
NAMES = {
    GPTQ: {"qweight": "qweight", "qzeros": "qzeros", "scales": "scales", "g_idx": "g_idx"},
    AWQ: {"qweight": "qweight", "qzeros": "qzeros", "scales": "scales", "g_idx": "g_idx"},
    PACKED: {
        "qweight": "weight_packed",
        "qzeros": "weight_zero_point",
        "scales": "weight_scale",
        "g_idx": "weight_g_idx",
    },
}
"""What GPTQ calls a tensor -> its name."""
INTEGERS = ("qweight", "weight_packed")
"""A module with one of these is quantised."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one module is quantised. group_size 0: all inputs are one group."""

    bits: int
    group_size: int
    is_symmetric: bool
    has_order: bool
    """desc_act: inputs are grouped by importance, and g_idx says how."""
    adds_one: bool
    """GPTQ's format v1: stored zero points are one too small."""
    stored: str = GPTQ
    """Whose tensors hold it; see stored.py."""

    def groups_of(self, num_inputs: int) -> int:
        return -(-num_inputs // self.group_len(num_inputs))

    def group_len(self, num_inputs: int) -> int:
        return self.group_size or num_inputs

    def __str__(self) -> str:
        group = f"group {self.group_size}" if self.group_size else "one group"
        kind = "symmetric" if self.is_symmetric else "asymmetric"
        return f"int{self.bits}, {group}, {kind}" + (", ordered" if self.has_order else "")


@dataclass(frozen=True, slots=True)
class Quantization:
    """Of a checkpoint: the usual scheme, and those of modules that have another."""

    scheme: Scheme
    rules: tuple[tuple[str, Scheme], ...] = ()
    """Patterns of module names; the first that matches counts."""
    method: str = GPTQ

    def scheme_of(self, module: str) -> Scheme:
        matching = (scheme for pattern, scheme in self.rules if re.match(pattern, module))
        return next(matching, self.scheme)

    def __str__(self) -> str:
        rules = "".join(f"; {pattern}: {scheme}" for pattern, scheme in self.rules)
        return f"{self.method} {self.scheme}{rules}"


ROUNDED_HEAD = Scheme(8, 128, True, False, False, "rounded")
"""Of a head that the checkpoint has as floats; see rounded_head.py."""


def quantized_modules(names: Iterable[str]) -> frozenset[str]:
    """Of a checkpoint with tensors of these names."""
    parts = (name.rpartition(".") for name in names)
    return frozenset(module for module, _, last in parts if last in INTEGERS)


def shapes_of(
    module: str, scheme: Scheme, num_outputs: int, num_inputs: int
) -> dict[str, tuple[int, ...]]:
    """The tensors that such a module has. Raises CheckpointError where its size does not fit."""
    per_word = 32 // scheme.bits
    if num_outputs % per_word or num_inputs % per_word:
        raise CheckpointError(
            f"{module} is [{num_outputs}, {num_inputs}]: int{scheme.bits} is stored in words of "
            f"{per_word}, and both must be multiples of it"
        )
    groups = scheme.groups_of(num_inputs)
    inputs, outputs = num_inputs // per_word, num_outputs // per_word
    shapes: dict[str, tuple[int, ...]]
    if scheme.stored == PACKED:
        shapes = {"weight_packed": (num_outputs, inputs), "weight_scale": (num_outputs, groups)}
        shapes["weight_shape"] = (2,)
        if not scheme.is_symmetric:
            shapes["weight_zero_point"] = (outputs, groups)
    else:
        shapes = {"qzeros": (groups, outputs), "scales": (groups, num_outputs)}
        is_awq = scheme.stored == AWQ
        shapes["qweight"] = (num_inputs, outputs) if is_awq else (inputs, num_outputs)
    if scheme.has_order:
        shapes[NAMES[scheme.stored]["g_idx"]] = (num_inputs,)
    return {f"{module}.{name}": shape for name, shape in shapes.items()}
