"""Decode steps as graphs of a device: one per number of rows, captured once and replayed.

Knows sizes, padding and the order of captures; what a graph is, its backend knows. A step of N
decodes runs in the smallest graph of at least N rows. The rows behind the N are padding: they read
a block that no sequence is ever given, and store nothing (`InputBuffers`). Anything else (prompts,
more rows than the largest graph, sizes that cannot be captured) is computed call by call.
"""

from __future__ import annotations

import bisect
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .inputs import StepInputs

logger = logging.getLogger(__name__)

FIRST_SIZES = (8, 4, 2, 1)
"""Captured before READY, beside the largest of all; the others one by one between steps."""

STRIDE = 8
"""Between the larger sizes: at most so many rows are padding, less one."""


Tensors = tuple[Tensor, ...]
"""What a step computes, each [rows, ...]."""


@dataclass(frozen=True, slots=True)
class Graph:
    """`replay` computes again, over the same addresses, what `output` then holds."""

    output: Tensors
    replay: Callable[[], None]


class GraphBackend(Protocol):
    def capture(self, function: Callable[[], Tensors]) -> Graph:
        """All graphs share one pool of memory: only the last replayed one's output is valid.

        Raises RuntimeError where the function does what no graph can hold.
        """
        ...


class GraphedDecodes:
    """For one function of inputs whose buffers never move, up to `max_num_rows` decodes.

    `blank(n)` gives inputs of n rows of padding: what a graph is captured over.
    """

    def __init__(
        self,
        function: Callable[[StepInputs], Tensors],
        blank: Callable[[int], StepInputs],
        backend: GraphBackend,
        max_num_rows: int,
        pulse: Callable[[], None],
    ) -> None:
        self._function = function
        self._blank = blank
        self._backend = backend
        self._pulse = pulse
        self._uncaptured = sizes_up_to(max_num_rows)
        self._graphs: dict[int, Graph] = {}
        self._captured_sizes: list[int] = []

    def capture_first(self) -> None:
        """The few sizes that READY waits for; the largest of all first, whose memory others use."""
        for size in (self._uncaptured[0], *FIRST_SIZES):
            if size in self._uncaptured:
                self._capture(size)

    def capture_next(self) -> None:
        """One more size, if any is left: between two steps, so that no stream waits for all."""
        if self._uncaptured:
            self._capture(self._uncaptured[0])

    def num_padded(self, num_rows: int) -> int:
        """How many rows a step of `num_rows` decodes is filled up to."""
        at = bisect.bisect_left(self._captured_sizes, num_rows)
        return self._captured_sizes[at] if at < len(self._captured_sizes) else num_rows

    def run(self, inputs: StepInputs) -> Tensors:
        """The function's result, which the next run overwrites; padding's rows included."""
        graph = self._graphs.get(len(inputs.token_ids)) if inputs.is_decode else None
        if graph is None:
            return self._function(inputs)
        graph.replay()
        self._pulse()
        return graph.output

    def _capture(self, size: int) -> None:
        self._uncaptured.remove(size)
        inputs = self._blank(size)
        try:
            with _collector_frozen():
                # Kernels that choose or allocate at their first call must not do so in a graph.
                self._function(inputs)
                self._graphs[size] = self._backend.capture(lambda: self._function(inputs))
        except RuntimeError as error:
            logger.warning("no graph for %d decodes, they run call by call: %s", size, error)
            return
        bisect.insort(self._captured_sizes, size)


def sizes_up_to(max_num_rows: int) -> list[int]:
    """Largest first: powers of two up to 8, then every eighth, and the largest step itself."""
    sizes = {1, 2, 4, *range(STRIDE, max_num_rows + 1, STRIDE), max_num_rows}
    return sorted((size for size in sizes if size <= max_num_rows), reverse=True)


@contextmanager
def _collector_frozen() -> Iterator[None]:
    """A tensor freed by the collector in the middle of a capture would spoil it."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
