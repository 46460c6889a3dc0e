"""Who comes in, decided at the door: before anything is tokenised. Knows no gRPC and no engine.

A request reserves one place per sample and an estimate of its prompt's tokens, and gives them back
when it ends. What is reserved at the door is what is counted, so a burst cannot pass it twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..engine.errors import DeadlineExpired, QueueFull
from ..engine.messages import StepRecord

BYTES_PER_TOKEN = 3
"""A low guess for text, so that the estimate of its tokens is rather too high."""

SMOOTHING = 0.1


class Pace:
    """Tokens per second that the engine computes in steps with prompts, smoothed.

    Steps of decodes alone are left out: they say little about how long a prompt will wait.
    """

    def __init__(self) -> None:
        self.tokens_per_s = 0.0

    def hear(self, record: StepRecord) -> None:
        has_prompt = record.num_tokens > len(record.outputs)
        if has_prompt and record.duration_s > 0.0:
            rate = record.num_tokens / record.duration_s
            weight = SMOOTHING if self.tokens_per_s else 1.0
            self.tokens_per_s += weight * (rate - self.tokens_per_s)

    def seconds_for(self, num_tokens: int) -> float:
        """0 while nothing is known."""
        return num_tokens / self.tokens_per_s if self.tokens_per_s else 0.0


@dataclass(slots=True)
class Place:
    """One request's reservation."""

    num_samples: int
    num_prompt_tokens: int
    is_started: bool = False
    """Its prompt is computed: it no longer stands before others."""


class Admission:
    """At most `max_requests` samples and `max_prompt_tokens` prompt tokens not yet computed."""

    def __init__(
        self,
        max_requests: int,
        max_prompt_tokens: int,
        pace: Pace,
        on_refusal: Callable[[str], None],
    ) -> None:
        self.max_requests = max_requests
        self.max_prompt_tokens = max_prompt_tokens
        self._pace = pace
        self._places: set[int] = set()
        self.num_requests = 0
        self.num_prompt_tokens = 0
        self._on_refusal = on_refusal

    def admit(self, num_samples: int, num_prompt_tokens: int, time_left_s: float | None) -> Place:
        """Raises QueueFull, or DeadlineExpired when the first token could not come in time."""
        wait_s = self._pace.seconds_for(self.num_prompt_tokens)
        if self.num_requests + num_samples > self.max_requests:
            raise self._refused("max_queued_requests", self.max_requests, wait_s)
        # A prompt larger than the whole quota may come alone.
        fits = self.num_prompt_tokens + num_prompt_tokens <= self.max_prompt_tokens
        if self.num_prompt_tokens and not fits:
            raise self._refused("max_queued_tokens", self.max_prompt_tokens, wait_s)
        if time_left_s is not None and time_left_s <= wait_s:
            self._on_refusal("deadline")
            raise DeadlineExpired(
                f"{max(0.0, time_left_s):.3f} s are left and the first token would take about "
                f"{wait_s:.3f} s; allow more time"
            )
        return self._reserve(Place(num_samples, num_prompt_tokens))

    def correct(self, place: Place, num_prompt_tokens: int) -> None:
        """The prompt was tokenised: the estimate becomes a count."""
        self.num_prompt_tokens += num_prompt_tokens - place.num_prompt_tokens
        place.num_prompt_tokens = num_prompt_tokens

    def start(self, place: Place) -> None:
        """The prompt is computed."""
        if not place.is_started:
            place.is_started = True
            self.num_prompt_tokens -= place.num_prompt_tokens

    def release(self, place: Place) -> None:
        if id(place) in self._places:
            self._places.remove(id(place))
            self.start(place)
            self.num_requests -= place.num_samples

    def _reserve(self, place: Place) -> Place:
        self._places.add(id(place))
        self.num_requests += place.num_samples
        self.num_prompt_tokens += place.num_prompt_tokens
        return place

    def _refused(self, quota: str, limit: int, wait_s: float) -> QueueFull:
        self._on_refusal(quota)
        return QueueFull(quota, limit, retry_after_s=min(60.0, max(0.1, wait_s)))


def estimated_tokens(num_bytes: int) -> int:
    return -(-num_bytes // BYTES_PER_TOKEN)
