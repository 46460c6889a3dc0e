"""Runs a function of tensors once, so that its native calls can run again without it.

Knows torch and native calls; knows no operation and no model. A recording is refused, and the
function's result is as good as ever, when anything but native calls computed something.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import native

Tensors = tuple[Tensor, ...]

ALIGNMENT_BYTES = 64
CALLS_PER_PULSE = 32
"""A few layers."""

aten = torch.ops.aten
VIEWS = {
    aten.alias.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.view.default,
}
"""Change no memory: what they show is in the addresses of later calls."""
ALLOCATIONS = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}


class MemoryPool:
    """Memory for what recorded functions compute in between, kept where it is.

    A tensor's memory is used again when the last view of it is gone, within a recording and by the
    next: recorded functions run one at a time.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._chunks: dict[int, np.ndarray] = {}
        """All of them, by their addresses."""

    def tensor(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Uninitialised, contiguous."""
        num_bytes = shape.numel() * dtype.itemsize
        if not num_bytes:
            return torch.empty(shape, dtype=dtype)
        chunk = self._take(num_bytes)
        lent = chunk[:num_bytes]
        # torch holds the array until the last tensor over it is gone.
        weakref.finalize(lent, self._free.append, chunk).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)

    def _take(self, num_bytes: int) -> np.ndarray:
        """The smallest free chunk that is large enough, else a new one."""
        fitting = [i for i, chunk in enumerate(self._free) if len(chunk) >= num_bytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda i: len(self._free[i])))
        memory = np.empty(num_bytes + ALIGNMENT_BYTES, dtype=np.uint8)
        start = -memory.ctypes.data % ALIGNMENT_BYTES
        chunk = memory[start : start + num_bytes]
        self._chunks[chunk.ctypes.data] = chunk
        return chunk

    def left(self, tensor: Tensor) -> Tensor:
        """The same, but its memory is given out again as soon as `tensor` is gone."""
        storage = tensor.untyped_storage()
        chunk = self._chunks.get(storage.data_ptr())
        if chunk is None:
            return tensor
        whole = torch.from_numpy(chunk[: storage.nbytes()]).view(tensor.dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Recording:
    """A function's native calls, and the tensors it returned: each `run` fills them anew."""

    def __init__(self, calls: list[native.RecordedCall], result: Tensors) -> None:
        self._program = native.Program(calls)
        self._result = result

    def run(self, pulse: Callable[[], None]) -> Tensors:
        """`pulse` is called now and then, so that a long run shows life."""
        num_calls = len(self._program)
        for first in range(0, num_calls, CALLS_PER_PULSE):
            self._program.run(first, min(CALLS_PER_PULSE, num_calls - first))
            pulse()
        return self._result


def record(function: Callable[[], Tensors], pool: MemoryPool) -> tuple[Tensors, Recording | None]:
    """The function's result; its recording, or None where torch itself computed something.

    The function reads its inputs from memory that stays. Its result lies in memory of the pool,
    which whatever is recorded or run next may overwrite.
    """
    with native.recording() as calls, _Watch(pool) as watch:
        computed = function()
    result = tuple(pool.left(tensor) for tensor in computed)
    is_whole = bool(calls) and not watch.num_computed
    return result, Recording(calls, result) if is_whole else None


class _Watch(TorchDispatchMode):
    """Gives out the pool's memory, and counts what torch computes."""

    def __init__(self, pool: MemoryPool) -> None:
        super().__init__()
        self._pool = pool
        self.num_computed = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch asks: to skip its compiler it would first import it, for more than a second."""
        return False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in ALLOCATIONS and out.is_contiguous() and out.device.type == "cpu":
            return self._pool.tensor(out.shape, out.dtype)
        self.num_computed += function not in VIEWS
        return out
