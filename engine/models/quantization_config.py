"""What a checkpoint says of its quantisation, read strictly: GPTQ, AWQ, compressed-tensors.

Raises UnsupportedModel for what would not be computed exactly, CheckpointError for nonsense; both
say the key and its value. Knows JSON; knows no tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedModel
from .quantization import AWQ, BITS, FORMATS, PACKED, Quantization, Scheme

WAY_OUT = (
    "serve the unquantised checkpoint, or quantise it as GPTQ (`pilotlight quantize`), AWQ, or "
    "compressed-tensors' pack-quantized"
)
Content = Mapping[str, Any]


def read_quantization(content: Content, folder: Path) -> Quantization | None:
    """From config.json, or quantize_config.json beside it. None: not quantised."""
    for key in ("quantization_config", "compression_config"):
        if content.get(key) is not None:
            return _quantization(content[key], f"config.json: {key}")
    separate = folder / "quantize_config.json"
    if separate.is_file():
        return _quantization(_read_json(separate), "quantize_config.json")
    return None


def _quantization(found: Any, where: str) -> Quantization:
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is {found!r}; an object is needed")
    readers = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors}
    method = found.get("quant_method", "gptq")
    reader = readers.get(method) if isinstance(method, str) else None
    if reader is None:
        raise UnsupportedModel(f"{where}: quant_method {method!r} is not supported; {WAY_OUT}")
    return reader(found, where)


# ---- GPTQ --------------------------------------------------------------------------------------


def _gptq(found: Content, where: str) -> Quantization:
    scheme = _gptq_scheme(found, where)
    return Quantization(scheme, tuple(_dynamic_rules(found, where)))


def _gptq_scheme(found: Content, where: str) -> Scheme:
    bits, group_size = _bits(found.get("bits"), where), found.get("group_size", -1)
    stored = found.get("checkpoint_format") or found.get("format") or "gptq"
    if stored not in FORMATS:
        raise UnsupportedModel(
            f"{where}: checkpoint_format is {stored!r}; {' and '.join(FORMATS)} are supported"
        )
    group_size = _group_size(group_size, bits, where)
    return Scheme(
        bits=bits,
        group_size=group_size,
        is_symmetric=_flag(found, "sym", True, where),
        # Of one group the order says nothing.
        has_order=_flag(found, "desc_act", False, where) and group_size > 0,
        adds_one=stored == "gptq",
    )


def _dynamic_rules(found: Content, where: str) -> list[tuple[str, Scheme]]:
    """GPTQModel's: "+:pattern" (or a bare one) changes, "-:pattern" leaves unquantised."""
    dynamic = found.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise CheckpointError(f"{where}: dynamic is {dynamic!r}; an object is needed")
    rules = []
    for pattern, changes in dynamic.items():
        bare = pattern.removeprefix("+:")
        if not bare.startswith("-:"):
            changed = {**found, **(changes if isinstance(changes, dict) else {})}
            rules.append((bare, _gptq_scheme(changed, f"dynamic rule {bare!r}")))
    return rules


# ---- AWQ ---------------------------------------------------------------------------------------


def _awq(found: Content, where: str) -> Quantization:
    bits = found.get("bits")
    if bits != 4:
        raise UnsupportedModel(f"{where}: bits is {bits!r}; AWQ is supported with 4; {WAY_OUT}")
    version = found.get("version", "gemm")
    if str(version).lower() != "gemm":
        raise UnsupportedModel(
            f"{where}: version is {version!r}; of AWQ's layouts gemm is supported; {WAY_OUT}"
        )
    if not _flag(found, "zero_point", True, where):
        raise UnsupportedModel(f"{where}: zero_point is false; AWQ without them is not supported")
    group_size = _group_size(found.get("group_size", 128), 4, where)
    return Quantization(Scheme(4, group_size, False, False, False, AWQ), method=AWQ)


# ---- compressed-tensors ------------------------------------------------------------------------

PLAIN_VALUES: Mapping[str, tuple[Any, ...]] = {
    "kv_cache_scheme": (None,),
    "transform_config": (None, {}),
    "quantization_status": (None, "compressed"),
}
"""Anything else in these changes what is computed or stored."""


def _compressed_tensors(found: Content, where: str) -> Quantization:
    for key, plain in PLAIN_VALUES.items():
        if found.get(key) not in plain:
            raise UnsupportedModel(f"{where}: {key} is {found[key]!r}, not supported; {WAY_OUT}")
    sparsity = found.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise UnsupportedModel(f"{where}: sparse weights ({sparsity['format']!r}); {WAY_OUT}")
    groups = found.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{where}: config_groups is {groups!r}; an object is needed")
    rules: list[tuple[str, Scheme]] = []
    for name, group in groups.items():
        rules += _rules_of_group(group, found, f"{where}: config_groups.{name}")
    schemes = {scheme for _, scheme in rules}
    return Quantization(rules[0][1], tuple(rules) if len(schemes) > 1 else (), "compressed-tensors")


def _rules_of_group(group: Any, found: Content, where: str) -> list[tuple[str, Scheme]]:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise UnsupportedModel(f"{where}: weights are not quantised there; {WAY_OUT}")
    stored = group.get("format") or found.get("format")
    if stored != PACKED:
        raise UnsupportedModel(f"{where}: format is {stored!r}; {PACKED} is supported; {WAY_OUT}")
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise UnsupportedModel(f"{where}: {key} are quantised, not supported; {WAY_OUT}")
    scheme = _packed_scheme(group["weights"], f"{where}.weights")
    targets = group.get("targets")
    if not isinstance(targets, list) or not targets:
        raise CheckpointError(f"{where}.targets is {targets!r}; a list of names is needed")
    return [(_pattern(str(target)), scheme) for target in targets]


def _pattern(target: str) -> str:
    """A class of modules, of which there is one here; a pattern; or a module's name."""
    if target == "Linear":
        return ""
    return target.removeprefix("re:") if target.startswith("re:") else f"{re.escape(target)}$"


def _packed_scheme(weights: Content, where: str) -> Scheme:
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    if kind != "int":
        raise UnsupportedModel(f"{where}: type is {kind!r}; int is supported; {WAY_OUT}")
    if weights.get("dynamic"):
        raise UnsupportedModel(f"{where}: dynamic is {weights['dynamic']!r}, not supported")
    bits, group_size = _bits(weights.get("num_bits"), where), weights.get("group_size")
    if strategy is None:
        strategy = {None: "tensor", -1: "channel"}.get(group_size, "group")
    if strategy not in ("group", "channel"):
        raise UnsupportedModel(
            f"{where}: strategy is {strategy!r}; group and channel are supported; {WAY_OUT}"
        )
    group_size = _group_size(group_size if strategy == "group" else -1, bits, where)
    order = weights.get("actorder")
    if order not in (None, False, True, "group", "dynamic", "weight", "static"):
        raise UnsupportedModel(f"{where}: actorder is {order!r}, not supported; {WAY_OUT}")
    has_order = order in (True, "group", "dynamic") and group_size > 0
    symmetric = _flag(weights, "symmetric", True, where)
    return Scheme(bits, group_size, symmetric, has_order, False, PACKED)


# ---- values ------------------------------------------------------------------------------------


def _bits(bits: Any, where: str) -> int:
    if bits not in BITS or type(bits) is not int:
        raise UnsupportedModel(f"{where}: bits is {bits!r}; 4 and 8 are supported; {WAY_OUT}")
    return bits


def _group_size(group_size: Any, bits: int, where: str) -> int:
    """0: all inputs are one group."""
    if type(group_size) is not int or not (group_size == -1 or group_size > 0):
        raise CheckpointError(f"{where}: group_size is {group_size!r}; -1 or a size is needed")
    if group_size > 0 and group_size % (32 // bits):
        raise UnsupportedModel(
            f"{where}: group_size is {group_size}; multiples of {32 // bits} are supported"
        )
    return max(group_size, 0)


def _flag(found: Content, key: str, default: bool, where: str) -> bool:
    value = found.get(key)
    value = default if value is None else value
    if type(value) is not bool:
        raise CheckpointError(f"{where}: {key} is {value!r}; true or false is needed")
    return value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error})") from error
