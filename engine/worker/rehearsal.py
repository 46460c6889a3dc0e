"""What steps take of a device's memory beside weights and cache, found by running the largest.

Knows memory as a meter shows it; what a step is, the runner knows.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import NotEnoughMemory
from .runner import Runner


@dataclass(frozen=True, slots=True)
class WorkingMemory:
    """`graphs`: with the buffers of inputs; `activations`: intermediate results at their most."""

    graph_bytes: int
    activation_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.graph_bytes + self.activation_bytes


class Meter(Protocol):
    """Of what this process has of one device, all figures beyond what it had at the last start."""

    def start(self) -> None: ...

    def held_bytes(self) -> int: ...

    def most_bytes(self) -> int: ...

    def release(self) -> None:
        """Gives back what nothing refers to any longer."""
        ...


class CudaMeter:
    """By the allocator's count, which graphs' own pools are part of."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def start(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_reserved(self._device)

    def held_bytes(self) -> int:
        return torch.cuda.memory_reserved(self._device) - self._before

    def most_bytes(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device) - self._before

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def meter_for(device: torch.device) -> Meter | None:
    """None on a CPU, whose memory others share from moment to moment."""
    return CudaMeter(device) if device.type == "cuda" else None


def rehearse(make: Callable[[], Runner], meter: Meter) -> WorkingMemory:
    """Of a runner like the one to come, but for its cache, of which there is next to nothing.

    Raises NotEnoughMemory where the largest step does not fit.
    """
    meter.start()
    try:
        runner = make()
        graph_bytes = meter.held_bytes()
        meter.start()
        runner.rehearse()
        activation_bytes = meter.most_bytes()
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(
            f"the largest step does not fit beside the weights ({error}); lower "
            "--max-batched-tokens or --max-num-seqs, free the card, or quantise"
        ) from error
    del runner
    meter.release()
    return WorkingMemory(graph_bytes, activation_bytes)
