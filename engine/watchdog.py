"""Judges from messages and a clock whether an engine lives. Knows no process and no asyncio.

An engine is stalled when nothing is heard from it for `heartbeat_timeout_s`, or when it has work
and neither a step nor a layer was finished for `progress_timeout_s`. An inference request is never
used as a probe: it would wait behind real ones, and say "dead" of an engine that is busy.
"""

from __future__ import annotations

from .messages import FromEngine, Heartbeat, StepRecord


class Watchdog:
    """Told of every message; asked on a clock. All times are of one monotonic clock."""

    def __init__(self, now_s: float, heartbeat_timeout_s: float, progress_timeout_s: float) -> None:
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._progress_timeout_s = progress_timeout_s
        self._heard_s = now_s
        self._moved_s = now_s
        self._position = (0, 0)
        self._judged_s = now_s

    def hear(self, message: FromEngine, now_s: float) -> None:
        self._heard_s = now_s
        match message:
            case StepRecord():
                self._moved_s = now_s
            case Heartbeat(step=step, pulse=pulse, num_in_flight=num_in_flight):
                if num_in_flight == 0 or (step, pulse) != self._position:
                    self._moved_s = now_s
                self._position = (step, pulse)
            case _:
                pass

    def heartbeat_age_s(self, now_s: float) -> float:
        return max(0.0, now_s - self._heard_s)

    def stall_reason(self, now_s: float) -> str:
        """Empty while all is well."""
        self._forgive_own_absence(now_s)
        silent_s, unmoved_s = now_s - self._heard_s, now_s - self._moved_s
        if silent_s > self._heartbeat_timeout_s:
            return f"no heartbeat for {silent_s:.1f} s (limit {self._heartbeat_timeout_s:g} s)"
        if unmoved_s > self._progress_timeout_s:
            return f"no layer finished for {unmoved_s:.1f} s (limit {self._progress_timeout_s:g} s)"
        return ""

    def _forgive_own_absence(self, now_s: float) -> None:
        """Where the judge itself did not run, it has not listened either."""
        absent_s = now_s - self._judged_s
        self._judged_s = now_s
        if absent_s > self._heartbeat_timeout_s / 2:
            self._heard_s += absent_s
            self._moved_s += absent_s
