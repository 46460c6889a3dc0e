"""How a checkpoint's matrices are quantised, read strictly. Knows no torch and no bytes.

GPTQ, as AutoGPTQ and GPTQModel write it: of a matrix [K, N] (inputs, outputs)

    qweight  int32 [K * bits / 32, N]   along K, lowest bits first
    qzeros   int32 [G, N * bits / 32]   along N; format gptq (v1) stores z - 1, gptq_v2 stores z
    scales         [G, N]
    g_idx    int32 [K]                  which group each input belongs to; may be absent

Which modules are quantised is seen by their tensors and not believed of the configuration.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedModel

BITS = (4, 8)
FORMATS = ("gptq", "gptq_v2")
WAY_OUT = "serve the unquantised checkpoint, or quantise it again as GPTQ"
PARTS = ("qweight", "qzeros", "scales")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one module is quantised. group_size 0: all inputs are one group."""

    bits: int
    group_size: int
    is_symmetric: bool
    has_order: bool
    """desc_act: inputs are grouped by importance, and g_idx says how."""
    adds_one: bool
    """Format v1: stored zero points are one too small."""

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
    """Of a checkpoint: the usual scheme, and rules for modules that have another."""

    scheme: Scheme
    rules: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    """Patterns of module names, and what of the scheme is different there."""

    def scheme_of(self, module: str) -> Scheme:
        for pattern, changes in self.rules:
            if re.match(pattern, module):
                return _scheme(self._described() | dict(changes), f"dynamic rule {pattern!r}")
        return self.scheme

    def _described(self) -> dict[str, Any]:
        s = self.scheme
        return {
            "bits": s.bits,
            "group_size": s.group_size or -1,
            "sym": s.is_symmetric,
            "desc_act": s.has_order,
            "checkpoint_format": "gptq" if s.adds_one else "gptq_v2",
        }

    def __str__(self) -> str:
        rules = "".join(f"; {pattern}: {dict(changes)}" for pattern, changes in self.rules)
        return f"gptq {self.scheme}{rules}"


def read_quantization(content: Mapping[str, Any], folder: Path) -> Quantization | None:
    """From config.json, or quantize_config.json beside it. None: not quantised.

    Raises UnsupportedModel for what would not be computed exactly, CheckpointError for nonsense.
    """
    if content.get("compression_config") is not None:
        raise UnsupportedModel(f"config.json: compression_config is not supported; {WAY_OUT}")
    where, found = "config.json: quantization_config", content.get("quantization_config")
    separate = folder / "quantize_config.json"
    if found is None and separate.is_file():
        where, found = "quantize_config.json", _read_json(separate)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is {found!r}; an object is needed")
    method = found.get("quant_method", "gptq")
    if method != "gptq":
        raise UnsupportedModel(f"{where}: quant_method {method!r} is not supported; {WAY_OUT}")
    return Quantization(_scheme(found, where), _rules(found.get("dynamic") or {}, where))


def _scheme(found: Mapping[str, Any], where: str) -> Scheme:
    bits, group_size = found.get("bits"), found.get("group_size", -1)
    if bits not in BITS or type(bits) is not int:
        raise UnsupportedModel(f"{where}: bits is {bits!r}; 4 and 8 are supported; {WAY_OUT}")
    if type(group_size) is not int or not (group_size == -1 or group_size > 0):
        raise CheckpointError(f"{where}: group_size is {group_size!r}; -1 or a size is needed")
    if group_size > 0 and group_size % (32 // bits):
        raise UnsupportedModel(
            f"{where}: group_size is {group_size}; multiples of {32 // bits} are supported"
        )
    stored = found.get("checkpoint_format") or found.get("format") or "gptq"
    if stored not in FORMATS:
        raise UnsupportedModel(
            f"{where}: checkpoint_format is {stored!r}; {' and '.join(FORMATS)} are supported"
        )
    return Scheme(
        bits=bits,
        group_size=max(group_size, 0),
        is_symmetric=_flag(found, "sym", True, where),
        # Of one group the order says nothing.
        has_order=_flag(found, "desc_act", False, where) and group_size > 0,
        adds_one=stored == "gptq",
    )


def _flag(found: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = found.get(key)
    value = default if value is None else value
    if type(value) is not bool:
        raise CheckpointError(f"{where}: {key} is {value!r}; true or false is needed")
    return value


def _rules(dynamic: Any, where: str) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """GPTQModel's: "+:pattern" (or a bare one) changes, "-:pattern" leaves unquantised."""
    if not isinstance(dynamic, dict):
        raise CheckpointError(f"{where}: dynamic is {dynamic!r}; an object is needed")
    rules = []
    for pattern, changes in dynamic.items():
        bare = pattern.removeprefix("+:")
        if not bare.startswith("-:"):
            rules.append((bare, changes if isinstance(changes, dict) else {}))
    return tuple(rules)


# ---- what is in the files ------------------------------------------------------------------------


def is_quantized(module: str, names: Collection[str]) -> bool:
    return f"{module}.qweight" in names


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
    return {
        f"{module}.qweight": (num_inputs // per_word, num_outputs),
        f"{module}.qzeros": (groups, num_outputs // per_word),
        f"{module}.scales": (groups, num_outputs),
    }


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error})") from error
