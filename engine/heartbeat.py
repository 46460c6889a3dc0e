"""Tells the front, on a clock, that the engine is alive and whether it gets anywhere.

A thread of its own: it still beats while a step is long, and `pulse`, which counts layers, shows
whether that step moves. Knows the core; knows no sockets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .core import EngineCore
from .messages import Heartbeat


class Pulse:
    """Counts layers run. Written by the engine loop only, read by the heartbeat."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


class Heart:
    """Sends a Heartbeat every `interval_s` until it is stopped."""

    def __init__(
        self,
        core: EngineCore,
        pulse: Pulse,
        interval_s: float,
        send: Callable[[Heartbeat], None],
    ) -> None:
        self._core = core
        self._pulse = pulse
        self._interval_s = interval_s
        self._send = send
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._beat_until_stopped, name="heartbeat", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns after the last beat."""
        self._stopped.set()
        self._thread.join()

    def beat(self) -> None:
        """Reads what the loop owns without a lock: each read is one call that cannot be torn."""
        statistics = self._core.statistics()
        live_request_ids = self._core.live_request_ids()
        self._send(
            Heartbeat(
                step=statistics.num_steps,
                pulse=self._pulse.count,
                num_in_flight=len(live_request_ids),
                at_s=time.monotonic(),
                live_request_ids=live_request_ids,
                statistics=statistics,
            )
        )

    def _beat_until_stopped(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self.beat()
