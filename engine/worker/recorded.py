"""Small steps, recorded once per shape and then run without Python.

Knows inputs and recordings; knows no model. Between two kernels the interpreter costs little, but
its code and data come from memory each time: the weights have pushed them out of the caches.

A step of decodes is recorded when it is first met: it will come again. One that computes a part of
a prompt beside them may be of a shape that never does, and is recorded when it is met twice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from ...kernels.cpu.recording import MemoryPool, Recording, record
from .inputs import StepInputs

Value = TypeVar("Value")
Tensors = tuple[Tensor, ...]
Shape = tuple[int, int, int]
"""Tokens, rows, and rows sampled after: all that calls and addresses depend on."""

MAX_RECORDED_TOKENS = 128
"""Larger steps are rare, and the kernels in them long."""
MAX_RECORDINGS = 256
"""Each is some 50 KB of calls. The one that has not run for longest makes room."""


class RecordedSteps:
    """For one function of inputs whose buffers never move; `pulse` shows that a step gets on."""

    def __init__(
        self, function: Callable[[StepInputs], Tensors], pulse: Callable[[], None]
    ) -> None:
        self._function = function
        self._pulse = pulse
        self._pool = MemoryPool()
        self._recordings: OrderedDict[Shape, Recording | None] = OrderedDict()
        self._met_once: OrderedDict[Shape, None] = OrderedDict()

    def num_padded(self, num_rows: int) -> int:
        """Steps are recorded for every number of tokens: none is filled up."""
        return num_rows

    def capture_next(self) -> None:
        """Nothing is recorded before a step needs it."""

    def run(self, inputs: StepInputs) -> Tensors:
        """The function's result, which the next run overwrites."""
        num_tokens = len(inputs.token_ids)
        shape = num_tokens, len(inputs.batch.context_lens), len(inputs.slots)
        if not inputs.is_leading or num_tokens > MAX_RECORDED_TOKENS:
            return self._function(inputs)
        if shape in self._recordings:
            self._recordings.move_to_end(shape)
            recording = self._recordings[shape]
            return self._function(inputs) if recording is None else recording.run(self._pulse)
        if not inputs.is_decode and shape not in self._met_once:
            _put(self._met_once, shape, None)
            return self._function(inputs)
        result, recording = record(lambda: self._function(inputs), self._pool)
        _put(self._recordings, shape, recording)
        return result


def _put(table: OrderedDict[Shape, Value], shape: Shape, value: Value) -> None:
    table[shape] = value
    if len(table) > MAX_RECORDINGS:
        table.popitem(last=False)
