"""Figures of repeated starts: summaries, phases of /startup, how much of a boot they explain.

Knows numbers and the JSON of /startup, and no process.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MOMENTS = ("ports_open_s", "ready_s", "first_token_s")


@dataclass(frozen=True, slots=True)
class Span:
    """One named stretch, seconds since process start; `parent` names the phase it lies in."""

    name: str
    started_s: float
    seconds: float
    parent: str = ""

    @property
    def ended_s(self) -> float:
        return self.started_s + self.seconds


@dataclass(frozen=True, slots=True)
class Start:
    """One start: its moments in seconds since the spawn, its phases, what part they explain."""

    moments: dict[str, float]
    spans: tuple[Span, ...] = ()
    attributed: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


def spans_of(startup: Mapping[str, Any]) -> tuple[Span, ...]:
    """The phases of a /startup answer; their length is `seconds`, `s` or `duration_s`."""
    return tuple(_span(phase) for phase in startup.get("phases", ()))


def _span(phase: Mapping[str, Any]) -> Span:
    seconds = next(phase[key] for key in ("seconds", "s", "duration_s") if key in phase)
    return Span(phase["name"], phase["started_s"], seconds, phase.get("parent") or "")


def attributed(startup: Mapping[str, Any], ready_s: float) -> float:
    """The part of [0, ready_s] that lies in phases without a parent; /startup itself may say."""
    if startup.get("attributed") is not None:
        return float(startup["attributed"])
    return covered_s((s for s in spans_of(startup) if not s.parent), ready_s) / ready_s


def covered_s(spans: Iterable[Span], end_s: float) -> float:
    """Seconds of [0, end_s] in at least one span: what overlaps counts once."""
    total_s = reached_s = 0.0
    for span in sorted(spans, key=lambda span: span.started_s):
        began_s, ended_s = max(span.started_s, reached_s), min(span.ended_s, end_s)
        total_s += max(0.0, ended_s - began_s)
        reached_s = max(reached_s, ended_s)
    return total_s


def summary(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def summaries(starts: Sequence[Start]) -> dict[str, Any]:
    """Each moment's summary, each phase's median seconds, and the median part explained."""
    names = starts[0].moments
    figures: dict[str, Any] = {n: summary([s.moments[n] for s in starts]) for n in names}
    if starts[0].spans:
        figures["phases"] = phase_medians(starts)
        figures["attributed"] = round(statistics.median(s.attributed for s in starts), 4)
    return figures


def phase_medians(starts: Sequence[Start]) -> dict[str, float]:
    """Over the starts in which a phase was; one that comes twice in a start counts as its sum."""
    sums = [_phase_sums(start) for start in starts]
    names = dict.fromkeys(name for one in sums for name in one)
    return {n: round(statistics.median(o[n] for o in sums if n in o), 4) for n in names}


def _phase_sums(start: Start) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for span in start.spans:
        seconds[span.name] = seconds.get(span.name, 0.0) + span.seconds
    return seconds


def paired_ratio(
    theirs: Sequence[Start], ours: Sequence[Start], name: str = "first_token_s"
) -> float:
    """Median of a moment, theirs / ours, over the rounds that both ran: above 1, we are faster."""
    pairs = zip(theirs, ours, strict=False)
    return round(statistics.median(t.moments[name] / o.moments[name] for t, o in pairs), 3)


def cold_ratio(cold_s: float, warm_s: float, num_bytes: int, bytes_per_s: float) -> float:
    """First token with no page in memory, over reading every byte once and a warm start."""
    return round(cold_s / (num_bytes / bytes_per_s + warm_s), 3)
