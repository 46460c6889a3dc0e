"""What a test case and the cost of a call are. Knows no operation.

Every module in this folder holds one operation: the function of the module's name, its `cost`, and
its `cases`. A case makes its inputs anew, and equal, each time it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import large_pages


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call must at least move and compute; a multiply-add counts as two operations."""

    num_bytes: int
    num_flops: int


class Inputs:
    """A seeded source of tensors of one dtype on one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device = device
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=self._generator) * scale
        return values.to(self.device, self.dtype)

    def cache(self, *shape: int) -> torch.Tensor:
        """Normal numbers that lie as an engine's caches do."""
        return as_cached(self.normal(*shape))

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        values = torch.randint(high, shape, generator=self._generator, dtype=torch.int32)
        return values.to(self.device)

    def permutation(self, length: int) -> torch.Tensor:
        return torch.randperm(length, generator=self._generator).to(torch.int32).to(self.device)

    def ints(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


def as_cached(values: torch.Tensor) -> torch.Tensor:
    """The same, in memory as an engine's caches have it."""
    if values.device.type != "cpu":
        return values
    return large_pages.zeros(tuple(values.shape), values.dtype).copy_(values)


Builder = Callable[[Inputs], tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class Case:
    """`name` says what is nasty about it; `build` makes the arguments of the operation."""

    name: str
    build: Builder
    is_timed: bool = False
    """The shape of a real model: worth timing as well as checking."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    """What its inputs can be."""

    def make(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[object, ...]:
        return self.build(Inputs(device, dtype, seed))


def integer_case(name: str, build: Builder, is_timed: bool = False) -> Case:
    """Of weights in panel16-int12, which multiply rows of bfloat16 alone."""
    return Case(f"{name}-int12", build, is_timed, (torch.bfloat16,))


def num_bytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
