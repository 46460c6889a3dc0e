"""The only dispatch: operation -> implementations, best first; chosen once, at load.

Three questions, kept apart: can it run here (`supported`), can it take these arguments (`accepts`),
is it preferred (its place in the table). None reads the environment. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .cpu import native

TABLE: dict[str, tuple[str, ...]] = {
    "rms_norm": ("triton", "cpu", "reference"),
    "add_rms_norm": ("triton", "cpu", "reference"),
    "rope_store_kv": ("triton", "cpu", "reference"),
    "rope_store_kv_int8": ("triton", "cpu", "reference"),
    "silu_mul": ("triton", "cpu", "reference"),
    "paged_attention": ("invariant", "flash", "triton", "cpu", "reference"),
    "paged_attention_int8": ("invariant", "triton", "cpu", "reference"),
    "linear": ("invariant", "cpu", "reference"),
    "packed_linear": ("cpu", "reference"),
    "packed_gate_up": ("cpu", "reference"),
    "packed_embedding": ("cpu", "reference"),
    "quantized_linear": ("invariant", "triton", "cpu", "reference"),
    "sample": ("triton", "cpu", "reference"),
}
"""Folders of this package; the module in each has the name of the operation."""

ATTENTION = ("paged_attention", "paged_attention_int8")

INVARIANT = "invariant"
"""Taken only where a row must not depend on what is beside it; on a CPU all of `cpu` are such."""

DEVICES = {"invariant": "cuda", "flash": "cuda", "triton": "cuda", "cpu": "cpu"}
"""Of a folder: for other devices its modules, and what they need, are not even imported."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """One callable per operation; `reference/` defines each. `choices`: operation -> folder."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    rope_store_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    rope_store_kv_int8: Callable[[*tuple[Tensor, ...]], None]
    silu_mul: Callable[[Tensor], Tensor]
    paged_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, int], Tensor]
    paged_attention_int8: Callable[..., Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    packed_linear: Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
    packed_gate_up: Callable[[Tensor, Tensor], Tensor]
    packed_embedding: Callable[[Tensor, Tensor, int, int], Tensor]
    quantized_linear: Callable[..., Tensor]
    sample: Callable[[Tensor, Tensor], Tensor]
    choices: dict[str, str]


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute `op`. The reference is supported everywhere and accepts everything."""

    op: str
    name: str

    def module(self) -> ModuleType:
        return import_module(f".{self.name}.{self.op}", __package__)

    def function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(self.module(), self.op)
        return function

    def supported(self, device: torch.device, dtype: torch.dtype) -> bool:
        if self.name == "reference":
            return True
        is_for = DEVICES[self.name] == device.type
        return is_for and bool(self.module().supported(device, dtype))

    def accepts(self, *args: object) -> bool:
        return self.name == "reference" or self.module().accepts(*args)


def implementations(op: str) -> list[Implementation]:
    """All implementations of `op`, best first, whether or not they run here."""
    return [Implementation(op, name) for name in TABLE[op]]


def bind(
    device: torch.device, dtype: torch.dtype, is_invariant: bool = False, attention: str = "auto"
) -> Kernels:
    """Choose for `device` and `dtype`. Arguments that the choice does not accept go to the next.

    `attention` names the folder that attention is taken from; ValueError where it cannot be.

    Native code uses as many threads as torch does at this moment.
    """
    native.set_num_threads(torch.get_num_threads())
    left_out = "" if is_invariant else INVARIANT
    usable = {op: [i for i in _usable(op, device, dtype) if i.name != left_out] for op in TABLE}
    if attention != "auto":
        usable |= _attention_from(attention, usable)
    functions = {op: _chained(ordered) for op, ordered in usable.items()}
    return Kernels(**functions, choices={op: ordered[0].name for op, ordered in usable.items()})


def _attention_from(
    name: str, usable: dict[str, list[Implementation]]
) -> dict[str, list[Implementation]]:
    """Attention's operations without those that come before `name`, where they have it."""
    names = [i.name for i in usable[ATTENTION[0]]]
    if INVARIANT in names:
        raise ValueError(f"a row must not depend on others: only {INVARIANT} is such here")
    if name not in names:
        raise ValueError(f"{name} cannot be used here; what can: {', '.join(names)}")
    passed_over = names[: names.index(name)]
    return {op: [i for i in usable[op] if i.name not in passed_over] for op in ATTENTION}


def _usable(op: str, device: torch.device, dtype: torch.dtype) -> list[Implementation]:
    return [i for i in implementations(op) if i.supported(device, dtype)]


def _chained(ordered: list[Implementation]) -> Callable[..., Any]:
    *preferred, last = ordered
    return reduce(_guarded, reversed(preferred), last.function())


def _guarded(otherwise: Callable[..., Any], choice: Implementation) -> Callable[..., Any]:
    function, accepts = choice.function(), choice.module().accepts

    def bound(*args: object) -> object:
        return function(*args) if accepts(*args) else otherwise(*args)

    return bound
