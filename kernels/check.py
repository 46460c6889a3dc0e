"""Compares an implementation with the reference computed in fp32 from the same inputs.

Knows no operation and no test framework; the tests and the benchmark both ask here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .reference.case import Case
from .table import Implementation

TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1.6e-2, 1e-2)}
"""Relative and absolute. bf16 holds 8 bits: two roundings, or rounded softmax weights, may add."""

INTEGER_TOLERANCE = (0.0, 1.0)
"""Two ways to the same fp32 number may lie on both sides of a half."""


def expected(op: str, case: Case, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    arguments = tuple(_widened(argument) for argument in case.make(device, dtype))
    return outcome(Implementation(op, "reference").function(), arguments)


def outcome(function: Callable[..., object], arguments: tuple[object, ...]) -> list[torch.Tensor]:
    """What a call leaves behind: its value, and its arguments, some of them changed."""
    returned = function(*arguments)
    return [t for t in (returned, *arguments) if isinstance(t, torch.Tensor)]


def assert_close(
    actual: list[torch.Tensor], wanted: list[torch.Tensor], dtype: torch.dtype
) -> None:
    """Raise AssertionError, with the place and the size of the worst difference."""
    for a, w in zip(actual, wanted, strict=True):
        relative, absolute = _tolerances(a.dtype, dtype)
        torch.testing.assert_close(a, w.to(a.dtype), rtol=relative, atol=absolute, equal_nan=True)


def _tolerances(found: torch.dtype, dtype: torch.dtype) -> tuple[float, float]:
    if found in (torch.int8, torch.int16):
        return INTEGER_TOLERANCE
    return TOLERANCES[dtype] if found.is_floating_point else (0.0, 0.0)


def _widened(argument: object) -> object:
    if isinstance(argument, torch.Tensor) and argument.is_floating_point():
        return argument.float().clone()
    return argument
