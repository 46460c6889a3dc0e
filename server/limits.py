"""Every bound on what a request may hold, in one table: validation, documents and fuzzing read it.

Names are paths of the proto's GenerateRequest. Bounds that depend on the model (its vocabulary,
its context) are checked in validation.py, against the facts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..engine.errors import InvalidField


@dataclass(frozen=True, slots=True)
class Limit:
    """A closed range of numbers, or of sizes in `unit`."""

    low: float
    high: float
    hint: str = ""
    unit: str = ""

    def text(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"must be {self.low:g} to {self.high:.10g}{unit}"


LIMITS: dict[str, Limit] = {
    "sampling.temperature": Limit(0, 10, "0 is greedy"),
    "sampling.top_k": Limit(0, 1_000_000, "0 keeps all tokens"),
    "sampling.top_p": Limit(1e-6, 1, "1 keeps all tokens"),
    "sampling.min_p": Limit(0, 1, "0 keeps all tokens"),
    "sampling.repetition_penalty": Limit(0.01, 10, "1 is no penalty"),
    "sampling.presence_penalty": Limit(-10, 10, "0 is no penalty"),
    "sampling.frequency_penalty": Limit(-10, 10, "0 is no penalty"),
    "sampling.logit_bias": Limit(0, 1024, unit="entries"),
    "sampling.logit_bias[]": Limit(-100, 100, "-100 forbids a token in effect"),
    "sampling.n": Limit(1, 8, "send several requests: they share the prompt's blocks too"),
    "stop.max_tokens": Limit(1, 1_000_000),
    "stop.min_tokens": Limit(0, 1_000_000),
    "stop.strings": Limit(0, 16, unit="strings"),
    "stop.strings[]": Limit(1, 256, unit="bytes"),
    "stop.token_ids": Limit(0, 64, unit="ids"),
    "output.logprobs": Limit(0, 20),
    "chat.messages": Limit(1, 1024, unit="messages"),
    "chat.messages[].role": Limit(1, 64, unit="bytes"),
    "request_id": Limit(0, 128, unit="bytes"),
    "request_ids": Limit(1, 1024, unit="ids"),
    "cache_salt": Limit(0, 128, unit="bytes"),
}

DEFAULT_MAX_TOKENS = 512
MAX_MESSAGE_BYTES = 16 << 20
MAX_METADATA_BYTES = 16 << 10


def check_number(field: str, value: float, key: str = "") -> None:
    """Raises InvalidField unless `value` is in the range of `field` (`key`: its general name)."""
    limit = LIMITS[key or field]
    if not math.isfinite(value):
        raise InvalidField(field, value, "must be a finite number", limit.text())
    if not limit.low <= value <= limit.high:
        raise InvalidField(field, value, limit.text(), limit.hint)


def check_size(field: str, size: int, key: str = "") -> None:
    """The same for how many things, or bytes, a field holds."""
    limit = LIMITS[key or field]
    if not limit.low <= size <= limit.high:
        raise InvalidField(field, Size(size, limit.unit), limit.text(), limit.hint)


@dataclass(frozen=True, slots=True)
class Size:
    """Shown instead of a value that is too long to show."""

    count: int
    unit: str

    def __repr__(self) -> str:
        return f"{self.count} {self.unit}"
