"""A device without one: graphs that run again over their buffers, copies that happen late."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

import torch
from pilotlight.engine.worker.graphs import Graph, Tensors
from torch import Tensor


@dataclass
class FakeGraphs:
    """Outputs share one pool: a replay spoils those of all other graphs, as on a real device."""

    refused: frozenset[int] = frozenset()
    captured: list[int] = field(default_factory=list)
    replayed: list[int] = field(default_factory=list)
    collector_was_on: list[bool] = field(default_factory=list)
    _outputs: list[Tensors] = field(default_factory=list)

    def capture(self, function: Callable[[], Tensors]) -> Graph:
        self.collector_was_on.append(gc.isenabled())
        output = tuple(tensor.clone() for tensor in function())
        size = len(output[0])
        if size in self.refused:
            raise RuntimeError(f"{size} rows cannot be captured")
        self.captured.append(size)
        self._outputs.append(output)

        def replay() -> None:
            self.replayed.append(size)
            with torch.inference_mode():
                for tensor in chain(*self._outputs):
                    tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
                for tensor, computed in zip(output, function(), strict=True):
                    tensor.copy_(computed)

        return Graph(output, replay)


class LateCopies:
    """Copies read their sources when somebody waits, not before; `arrived` is what they read."""

    copies = True

    def __init__(self) -> None:
        self.arrived: list[list[int]] = []
        self._begun: list[tuple[Tensor, Tensor]] = []
        self._fenced: list[tuple[Tensor, Tensor]] = []

    def host(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    def mirror(self, host: Tensor) -> Tensor:
        return host.clone()

    def copy(self, source: Tensor, target: Tensor) -> None:
        self._begun.append((source, target))

    def fence(self) -> None:
        self._fenced += self._begun
        self._begun = []

    def fetch(self, computed: Tensor) -> Callable[[], Tensor]:
        copied = computed.clone()
        return lambda: copied

    def wait(self) -> None:
        for source, target in self._fenced:
            target.copy_(source)
            self.arrived.append(target.flatten().tolist())
        self._fenced = []
