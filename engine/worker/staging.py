"""How host arrays reach the device: one memory on a CPU, asynchronous copies to a CUDA device.

Knows memory and the order of copies; knows no steps. A host array may be written again only when
the copies that read it are done: whoever writes calls `wait` first, whoever copied calls `fence`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Staging(Protocol):
    copies: bool
    """Whether the device has memory of its own."""

    def host(self, shape: tuple[int, ...]) -> Tensor:
        """Zeroed int32 that this device can copy from without waiting for it."""
        ...

    def mirror(self, host: Tensor) -> Tensor:
        """The device's memory for `host`; `host` itself where they are one."""
        ...

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Begins the copy; what is computed afterwards sees it done."""
        ...

    def fence(self) -> None:
        """Marks the copies begun so far."""
        ...

    def wait(self) -> None:
        """Returns when the copies before the last fence have read their sources."""
        ...

    def fetch(self, computed: Tensor) -> Callable[[], Tensor]:
        """Begins to copy to the host what was computed so far: later steps may overwrite it.

        The result waits for the copy, and for nothing that was begun after it.
        """
        ...


class OneMemory:
    """A CPU: host arrays are what is computed on."""

    copies = False

    def host(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    def mirror(self, host: Tensor) -> Tensor:
        return host

    def copy(self, source: Tensor, target: Tensor) -> None:
        pass

    def fence(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def fetch(self, computed: Tensor) -> Callable[[], Tensor]:
        copied = computed.clone()
        return lambda: copied


class PinnedCopies:
    """A CUDA device: page-locked arrays, copied on the stream that computes."""

    copies = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copied = torch.cuda.Event()

    def host(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, pin_memory=True)

    def mirror(self, host: Tensor) -> Tensor:
        return host.to(self._device)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def fence(self) -> None:
        self._copied.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        self._copied.synchronize()

    def fetch(self, computed: Tensor) -> Callable[[], Tensor]:
        host = torch.empty(computed.shape, dtype=computed.dtype, pin_memory=True)
        host.copy_(computed, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))

        def arrived() -> Tensor:
            copied.synchronize()
            return host

        return arrived


def staging_for(device: torch.device) -> Staging:
    return PinnedCopies(device) if device.type == "cuda" else OneMemory()
