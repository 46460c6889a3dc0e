"""Which requests a load consists of: when each is due, how long it is and how long its answer.

Pure and seeded: the same arguments plan the same load. Knows no server and no clock.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Planned:
    """One request: due `at_s` after the start of the load, lengths in tokens."""

    at_s: float
    input_len: int
    output_len: int
    is_clamped: bool = False


@dataclass(frozen=True, slots=True)
class Lengths:
    """Whole numbers from `low` to `high`, both included, all equally likely."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """`128`, or a range as `64:512`. Raises ValueError."""
        low, colon, high = text.partition(":")
        lengths = cls(int(low), int(high if colon else low))
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError(f"{text!r} is not a range of positive lengths")
        return lengths

    def draw(self, source: random.Random) -> int:
        return source.randint(self.low, self.high)


def poisson_times(rate: float, seed: int) -> Iterator[float]:
    """Endless: exponential gaps, `rate` a second on average; an infinite rate has no gaps."""
    source = random.Random(f"arrivals {seed}")
    at_s = 0.0
    while True:
        yield at_s
        at_s += source.expovariate(rate)


def random_plans(
    times: Iterable[float], inputs: Lengths, outputs: Lengths, seed: int
) -> Iterator[Planned]:
    source = random.Random(f"lengths {seed}")
    for at_s in times:
        yield Planned(at_s, inputs.draw(source), outputs.draw(source))


def retimed(plans: Iterable[Planned], times: Iterable[float]) -> Iterator[Planned]:
    """The lengths of `plans` at other times."""
    for planned, at_s in zip(plans, times, strict=False):
        yield replace(planned, at_s=at_s)


def clamped(planned: Planned, context_len: int) -> Planned:
    """What a context of `context_len` can hold; where both are too long, half of it for each."""
    output_len = max(1, planned.output_len)
    output_len = min(output_len, max(context_len // 2, context_len - planned.input_len))
    output_len = min(output_len, context_len - 1)
    input_len = min(max(1, planned.input_len), context_len - output_len)
    fits = (input_len, output_len) == (planned.input_len, planned.output_len)
    return replace(planned, input_len=input_len, output_len=output_len, is_clamped=not fits)
