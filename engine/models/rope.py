"""Rotary embedding: which scaling config.json asks for, and the frequencies it means.

Plain Python; knows no torch. Formulas: transformers' modeling_rope_utils (default, linear, llama3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, UnsupportedModel

if TYPE_CHECKING:
    from .config import ConfigReader


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """`kind` is "linear" or "llama3"; the last three fields are llama3's."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_len: int = 8192


def read_rope(reader: ConfigReader) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    parameters = reader.get("rope_parameters") or reader.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise CheckpointError(f"config.json: rope parameters are {parameters!r}; no object")
    theta = parameters.get("rope_theta", reader.get("rope_theta"))
    theta = 10000.0 if theta is None else theta
    if type(theta) not in (int, float) or not 0 < theta < math.inf:
        raise CheckpointError(f"config.json: rope_theta is {theta!r}; a positive number is needed")
    fraction = parameters.get("partial_rotary_factor", 1.0)
    if fraction != 1.0:
        raise UnsupportedModel(
            f"config.json: partial_rotary_factor is {fraction!r}; only 1.0 is supported"
        )
    nested = [key for key, value in parameters.items() if isinstance(value, dict)]
    if nested:
        raise UnsupportedModel(f"config.json: rope parameters of {nested[0]!r}: not supported")
    return float(theta), _scaling(parameters)


def _scaling(parameters: dict[str, Any]) -> RopeScaling | None:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return None
    try:
        if kind == "linear":
            return RopeScaling("linear", _positive(parameters, "factor"))
        if kind == "llama3":
            return RopeScaling(
                "llama3",
                _positive(parameters, "factor"),
                _positive(parameters, "low_freq_factor"),
                _positive(parameters, "high_freq_factor"),
                int(_positive(parameters, "original_max_position_embeddings")),
            )
    except KeyError as error:
        raise CheckpointError(f"config.json: rope scaling {kind!r} lacks {error}") from error
    raise UnsupportedModel(
        f"config.json: rope scaling {kind!r} is not one of 'default', 'linear', 'llama3'"
    )


def _positive(parameters: dict[str, Any], key: str) -> float:
    value = parameters[key]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: rope scaling {key} is {value!r}; it must be positive")
    return float(value)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> list[float]:
    """Radians per position of the head_dim / 2 rotating pairs."""
    plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return [f / scaling.factor for f in plain]
    return [_llama3(f, scaling) for f in plain]


def _llama3(frequency: float, scaling: RopeScaling) -> float:
    """Long wavelengths are stretched, short ones kept, those between blended."""
    turns = scaling.original_context_len * frequency / (2 * math.pi)
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    if turns > scaling.high_freq_factor:
        return frequency
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - blend) * frequency / scaling.factor + blend * frequency
