"""What a device can do at best: copy, read, multiply, take from the host. Knows no operation.

Timed with the device's own events where it has them, so that what is measured is its work and not
the moment at which it was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

REPEAT = 7
WARM_UPS = 2


@dataclass(frozen=True)
class Limits:
    """Per second; `copy` counts what is read and what is written, each once."""

    copy_bytes: float
    read_bytes: float
    bf16_flops: float
    pinned_bytes: float

    def least_s(self, num_bytes: float, num_flops: float = 0.0) -> float:
        """The roofline: no call is faster."""
        return max(num_bytes / self.read_bytes, num_flops / self.bf16_flops)


def measured(device: torch.device, num_bytes: int = 4 << 30, matrix: int = 8192) -> Limits:
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source), device)
    sum_s = median_s(lambda: source.sum(), device)
    a, b = (torch.randn(matrix, matrix, device=device).bfloat16() for _ in range(2))
    multiply_s = median_s(lambda: a @ b, device)
    copy_rate = 2 * num_bytes / copy_s
    return Limits(
        copy_bytes=copy_rate,
        # A copy reads half of what it moves, but shares the lanes with what it writes.
        read_bytes=max(copy_rate, num_bytes / sum_s),
        bf16_flops=2 * matrix**3 / multiply_s,
        pinned_bytes=_pinned_rate(device, num_bytes // 4),
    )


def median_s(
    call: Callable[[], object],
    device: torch.device,
    before: Callable[[], object] = lambda: None,
    repeat: int = REPEAT,
) -> float:
    """Of a call; `before` runs before each and is not counted."""
    times = []
    for _ in range(WARM_UPS + repeat):
        before()
        times.append(_elapsed_s(call, device))
    return median(times[WARM_UPS:])


def _elapsed_s(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began_s = time.perf_counter()
        call()
        return time.perf_counter() - began_s
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    call()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3


def _pinned_rate(device: torch.device, num_bytes: int) -> float:
    host = torch.ones(num_bytes // 4, pin_memory=device.type == "cuda")
    target = torch.empty_like(host, device=device)
    return num_bytes / median_s(lambda: target.copy_(host, non_blocking=True), device)
