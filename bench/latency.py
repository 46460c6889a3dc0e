"""What became of requests, and what that says in figures. Knows no gRPC and no clock.

Latencies are of requests that succeeded; the others are counted by their status.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from .arrivals import Planned

OK = "OK"
PERCENTILES = (50, 90, 95, 99)


@dataclass(slots=True)
class Outcome:
    """One request at the client. Moments are readings of one clock; `due_s` starts them all."""

    planned: Planned
    due_s: float
    sent_s: float
    ended_s: float = 0.0
    code: str = OK
    message: str = ""
    first_token_s: float = 0.0
    newest_token_s: float = 0.0
    num_output_tokens: int = 0
    gaps_s: array[float] = field(default_factory=lambda: array("d"))
    """Between tokens. Those that came together share the time since the tokens before."""

    def hear(self, num_tokens: int, now_s: float) -> None:
        """`num_tokens` came; those that came with the very first have no gap."""
        if num_tokens == 0:
            return
        if self.num_output_tokens == 0:
            self.first_token_s = now_s
        else:
            self.gaps_s.extend([(now_s - self.newest_token_s) / num_tokens] * num_tokens)
        self.newest_token_s = now_s
        self.num_output_tokens += num_tokens

    def end(self, now_s: float, code: str = OK, message: str = "") -> None:
        """An answer of another length than asked for is no success."""
        self.ended_s, self.code, self.message = now_s, code, message
        wanted = self.planned.output_len
        if code == OK and self.num_output_tokens != wanted:
            self.code = "INCOMPLETE"
            self.message = f"{self.num_output_tokens} of {wanted} tokens came"

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.due_s

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.due_s

    @property
    def mean_itl_s(self) -> float:
        return sum(self.gaps_s) / len(self.gaps_s) if self.gaps_s else 0.0


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a good request keeps to; None: no matter."""

    ttft_ms: float | None = None
    itl_ms: float | None = None
    """Of a request's mean gap."""

    @property
    def is_given(self) -> bool:
        return (self.ttft_ms, self.itl_ms) != (None, None)

    def are_met(self, outcome: Outcome) -> bool:
        pairs = ((outcome.ttft_s, self.ttft_ms), (outcome.mean_itl_s, self.itl_ms))
        return all(limit is None or value_s * 1000 <= limit for value_s, limit in pairs)


def summary(outcomes: Sequence[Outcome], began_s: float, objectives: Objectives) -> dict[str, Any]:
    """All figures by stable names; what cannot be said is None. `began_s`: the load's start."""
    good = [outcome for outcome in outcomes if outcome.code == OK]
    duration_s = max((outcome.ended_s for outcome in outcomes), default=began_s) - began_s
    return {
        **_counts(outcomes, good),
        "duration_s": round(duration_s, 6),
        **_rates(good, duration_s, objectives),
        "slo_ttft_ms": objectives.ttft_ms,
        "slo_itl_ms": objectives.itl_ms,
        "ttft_s": distribution([outcome.ttft_s for outcome in good]),
        "itl_s": distribution(list(chain.from_iterable(outcome.gaps_s for outcome in good))),
        "e2e_s": distribution([outcome.e2e_s for outcome in good]),
        "send_lag_s": distribution([outcome.sent_s - outcome.due_s for outcome in outcomes]),
    }


def distribution(values: Sequence[float]) -> dict[str, float | None]:
    """Percentiles interpolate linearly."""
    names = [*(f"p{p}" for p in PERCENTILES), "mean", "max"]
    if not values:
        return dict.fromkeys(names)
    found = [*np.percentile(values, PERCENTILES), np.mean(values), np.max(values)]
    return {name: round(float(value), 6) for name, value in zip(names, found, strict=True)}


def _counts(outcomes: Sequence[Outcome], good: Sequence[Outcome]) -> dict[str, Any]:
    errors = Counter(outcome.code for outcome in outcomes if outcome.code != OK)
    return {
        "num_requests": len(outcomes),
        "num_ok": len(good),
        "num_errors": len(outcomes) - len(good),
        "errors": dict(sorted(errors.items())),
        "num_clamped": sum(outcome.planned.is_clamped for outcome in outcomes),
        "num_input_tokens": sum(outcome.planned.input_len for outcome in good),
        "num_output_tokens": sum(outcome.num_output_tokens for outcome in good),
    }


def _rates(
    good: Sequence[Outcome], duration_s: float, objectives: Objectives
) -> dict[str, float | None]:
    num_output = sum(outcome.num_output_tokens for outcome in good)
    num_total = num_output + sum(outcome.planned.input_len for outcome in good)
    num_met = sum(objectives.are_met(outcome) for outcome in good)

    def a_second(count: int) -> float:
        return round(count / duration_s, 4) if duration_s > 0 else 0.0

    return {
        "requests_per_s": a_second(len(good)),
        "output_tokens_per_s": a_second(num_output),
        "total_tokens_per_s": a_second(num_total),
        "goodput_requests_per_s": a_second(num_met) if objectives.is_given else None,
    }


def first_messages(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Of each status that is not OK, what the first request was told."""
    messages: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.code != OK:
            messages.setdefault(outcome.code, outcome.message)
    return messages
