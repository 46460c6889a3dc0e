"""The only dispatch: operation -> implementations, best first; chosen once, at load.

Three questions, kept apart: can it run here (`supported`), can it take these arguments (`accepts`),
is it preferred (its place in the table). Attention is chosen for prompts and for decodes, and is
asked a fourth: is it made for them on this device (`suits`). None reads the environment. Knows no
engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from itertools import dropwhile
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
    "rope_store_kv_int16": ("cpu", "reference"),
    "silu_mul": ("triton", "cpu", "reference"),
    "paged_attention": ("invariant", "flash", "pytorch", "triton", "cpu", "reference"),
    "paged_attention_int8": ("invariant", "triton", "cpu", "reference"),
    "paged_attention_int16": ("cpu", "reference"),
    "linear": ("invariant", "cpu", "reference"),
    "packed_linear": ("cpu", "reference"),
    "packed_gate_up": ("cpu", "reference"),
    "packed_embedding": ("cpu", "reference"),
    "quantized_linear": ("invariant", "triton", "cpu", "reference"),
    "sample": ("triton", "cpu", "reference"),
}
"""Folders of this package; the module in each has the name of the operation."""

ATTENTION = ("paged_attention", "paged_attention_int8", "paged_attention_int16")

DECODES = {"paged_attention": ("invariant", "flash", "triton", "pytorch", "cpu", "reference")}
"""Where decodes prefer another order than prompts."""

INVARIANT = "invariant"
"""Taken only where a row must not depend on what is beside it; on a CPU all of `cpu` are such."""

DEVICES = {
    "invariant": "cuda",
    "flash": "cuda",
    "pytorch": "cuda",
    "triton": "cuda",
    "cpu": "cpu",
}
"""Of a folder: for other devices its modules, and what they need, are not even imported."""


@dataclass(frozen=True, slots=True)
class Attention:
    """What is asked for: folders, or `auto`. `prompts`: auto is what is asked for of decodes."""

    decodes: str = "auto"
    prompts: str = "auto"
    block_size: int = 16


@dataclass(frozen=True, slots=True)
class Kernels:
    """One callable per operation; `reference/` defines each."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    rope_store_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    rope_store_kv_int8: Callable[[*tuple[Tensor, ...]], None]
    rope_store_kv_int16: Callable[[*tuple[Tensor, ...]], None]
    silu_mul: Callable[[Tensor], Tensor]
    paged_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, int], Tensor]
    paged_attention_int8: Callable[..., Tensor]
    paged_attention_int16: Callable[..., Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    packed_linear: Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
    packed_gate_up: Callable[[Tensor, Tensor], Tensor]
    packed_embedding: Callable[[Tensor, Tensor, int, int], Tensor]
    quantized_linear: Callable[..., Tensor]
    sample: Callable[[Tensor, Tensor], Tensor]
    choices: dict[str, str]
    """Operation -> folder; of attention, where they differ, that of prompts and that of decodes."""
    on_reference: frozenset[str]
    """Operations that a decode step takes from the reference."""


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

    def suits(self, device: torch.device, is_decode: bool, block_size: int) -> bool:
        """Of attention that is supported: most is made for all prompts and all decodes."""
        suits = getattr(self.module(), "suits", None)
        return suits is None or bool(suits(device, is_decode, block_size))


def implementations(op: str) -> list[Implementation]:
    """All implementations of `op`, best first, whether or not they run here."""
    return [Implementation(op, name) for name in TABLE[op]]


def bind(
    device: torch.device,
    dtype: torch.dtype,
    is_invariant: bool = False,
    attention: Attention = Attention(),
    is_right: Callable[[Implementation, bool], bool] = lambda implementation, is_decode: True,
) -> Kernels:
    """Choose for `device` and `dtype`. Arguments that the choice does not accept go to the next.

    `is_right`: of attention, and whether it is for decodes: what is not, is passed over (probe.py).
    ValueError where attention cannot be taken from what `attention` names.

    Native code uses as many threads as torch does at this moment.
    """
    native.set_num_threads(torch.get_num_threads())
    left_out = "" if is_invariant else INVARIANT
    usable = {op: [i for i in _usable(op, device, dtype) if i.name != left_out] for op in TABLE}
    prompts, decodes = (
        usable
        | _checked(_attention_from(attention, usable, device, is_decode), is_decode, is_right)
        for is_decode in (False, True)
    )
    return Kernels(
        **{op: _by_phase(prompts[op], decodes[op]) for op in TABLE},
        choices={op: _named(prompts[op][0].name, decodes[op][0].name) for op in TABLE},
        on_reference=frozenset(op for op in TABLE if decodes[op][0].name == "reference"),
    )


def _attention_from(
    asked: Attention,
    usable: dict[str, list[Implementation]],
    device: torch.device,
    is_decode: bool,
) -> dict[str, list[Implementation]]:
    """Attention's operations for one phase, without those that come before what is asked for."""
    phase = "decodes" if is_decode else "prompts"
    name = asked.decodes if is_decode or asked.prompts == "auto" else asked.prompts
    ordered = {op: _ordered(usable[op], is_decode) for op in ATTENTION}
    suiting = {
        op: [i for i in ordered[op] if i.suits(device, is_decode, asked.block_size)]
        for op in ordered
    }
    if name == "auto":
        return suiting
    names = [i.name for i in suiting[ATTENTION[0]]]
    if INVARIANT in names:
        raise ValueError(f"a row must not depend on others: only {INVARIANT} is such here")
    if name not in names:
        raise ValueError(
            f"{name} cannot be used here for {phase} in blocks of {asked.block_size}; what can: "
            f"{', '.join(names)}"
        )
    passed_over = names[: names.index(name)]
    return {op: [i for i in suiting[op] if i.name not in passed_over] for op in ATTENTION}


def _checked(
    attention: dict[str, list[Implementation]],
    is_decode: bool,
    is_right: Callable[[Implementation, bool], bool],
) -> dict[str, list[Implementation]]:
    """Without those before the first that is right: only what is used need be asked."""

    def is_wrong(implementation: Implementation) -> bool:
        return implementation.name != "reference" and not is_right(implementation, is_decode)

    return {op: list(dropwhile(is_wrong, ordered)) for op, ordered in attention.items()}


def _ordered(usable: list[Implementation], is_decode: bool) -> list[Implementation]:
    order = DECODES.get(usable[0].op) if is_decode else None
    return sorted(usable, key=lambda i: order.index(i.name)) if order else usable


def _named(prompts: str, decodes: str) -> str:
    return decodes if prompts == decodes else f"{prompts} (prompts), {decodes} (decodes)"


def _by_phase(prompts: list[Implementation], decodes: list[Implementation]) -> Callable[..., Any]:
    for_prompts = _chained(prompts)
    if prompts == decodes:
        return for_prompts
    for_decodes = _chained(decodes)

    def bound(q: Tensor, *args: Any) -> object:
        *_, context_lens, _scale, _sliding_window = args
        return (for_decodes if len(q) == len(context_lens) else for_prompts)(q, *args)

    return bound


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
