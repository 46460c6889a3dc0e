"""Steps of decodes alone, recorded once per number of tokens and then run without Python.

Knows inputs and recordings; knows no model. Between two kernels the interpreter costs little, but
its code and data come from memory each time: the weights have pushed them out of the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from ...kernels.cpu.recording import MemoryPool, Recording, record
from .inputs import StepInputs

Result = TypeVar("Result")
"""Tensors of some kind."""

MAX_RECORDED_TOKENS = 128
"""Larger steps are rare, and the kernels in them long."""


class RecordedDecodes(Generic[Result]):
    """For one function of inputs whose buffers never move; `pulse` shows that a step gets on."""

    def __init__(self, function: Callable[[StepInputs], Result], pulse: Callable[[], None]) -> None:
        self._function = function
        self._pulse = pulse
        self._pool = MemoryPool()
        self._recordings: dict[int, Recording[Result] | None] = {}

    def num_padded(self, num_rows: int) -> int:
        """Steps are recorded for every number of tokens: none is filled up."""
        return num_rows

    def capture_next(self) -> None:
        """Nothing is recorded before a step needs it."""

    def run(self, inputs: StepInputs) -> Result:
        """The function's result, which the next run overwrites."""
        num_tokens = len(inputs.token_ids)
        if not inputs.is_decode or num_tokens > MAX_RECORDED_TOKENS:
            return self._function(inputs)
        if num_tokens not in self._recordings:
            return self._record(num_tokens, inputs)
        recording = self._recordings[num_tokens]
        return self._function(inputs) if recording is None else recording.run(self._pulse)

    def _record(self, num_tokens: int, inputs: StepInputs) -> Result:
        result, recording = record(lambda: self._function(inputs), self._pool)
        self._recordings[num_tokens] = recording
        return result
