"""How a device takes bytes from the ring: CUDA by its copy engine, the processor by itself.

Knows torch's streams and memory; knows no artefacts.
"""

from __future__ import annotations

import torch

from ..pages import address_of
from ..reader.ring import Ring
from .device import Copier, Fence


def copier_for(device: torch.device) -> Copier:
    return CudaCopier(device) if device.type == "cuda" else HostCopier()


class _Done:
    def wait(self) -> None:
        """It is."""


class HostCopier:
    """Into memory of the processor: what a device does, where there is none."""

    def open(self, ring: Ring, num_bytes: int) -> torch.Tensor:
        self._ring = torch.frombuffer(ring.memory, dtype=torch.uint8)
        self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory

    def copy(self, start: int, num_bytes: int, offset: int) -> Fence:
        self._memory[offset : offset + num_bytes] = self._ring[start : start + num_bytes]
        return _Done()

    def close(self) -> None:
        del self._ring, self._memory


class CudaCopier:
    """On a stream of its own, from page-locked memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def open(self, ring: Ring, num_bytes: int) -> torch.Tensor:
        self._address = address_of(ring.memory)
        _check(torch.cuda.cudart().cudaHostRegister(self._address, len(ring.memory), 0))
        self._ring = torch.frombuffer(ring.memory, dtype=torch.uint8)
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        # The allocator may hand out memory that work on the present stream still reads.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return self._memory

    def copy(self, start: int, num_bytes: int, offset: int) -> Fence:
        with torch.cuda.stream(self._stream):
            target = self._memory[offset : offset + num_bytes]
            target.copy_(self._ring[start : start + num_bytes], non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return _CudaFence(event)

    def close(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._stream.synchronize()
        del self._ring, self._memory
        _check(torch.cuda.cudart().cudaHostUnregister(self._address))


class _CudaFence:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


def _check(status: object) -> None:
    """cudart's functions return a status."""
    if int(status) != 0:  # type: ignore[call-overload]
        raise RuntimeError(f"CUDA cannot page-lock the ring: {status}")
