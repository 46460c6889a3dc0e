"""A clock that the test moves, for the load generator: it waits for hours in no time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pilotlight.bench import load as load_module


class Clock:
    """Stands for the modules `time` and `asyncio` of the load: a sleep only moves the clock."""

    def __init__(self, tick_s: float = 0.0) -> None:
        self.now_s = 1000.0
        self.tick_s = tick_s
        """Every reading takes this long."""
        self.sleeps: list[float] = []

    def perf_counter(self) -> float:
        self.now_s += self.tick_s
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        """What was started before runs first, as it would."""
        self.sleeps.append(seconds)
        await asyncio.sleep(0)
        self.now_s += seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)


def set_clock(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Clock:
    monkeypatch.setattr(load_module, "time", clock)
    monkeypatch.setattr(load_module, "asyncio", clock)
    return clock
