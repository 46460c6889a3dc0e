"""What this machine can do at best: read memory, multiply. Knows no operation.

A measurement against which others are held, so each call is one sample: take it beside what it
judges, and as often, because other programs take their part of the machine. Without the native
library PyTorch stands in.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

import torch
from torch import Tensor

from . import native
from .tensors import WEIGHT_CODES

_ARGUMENTS = struct.Struct("PPqq")
"""LimitArgs in src/level.h."""

_PIECE_BYTES = 128 << 10
_OPERATIONS = 100_000_000
"""Of each thread: milliseconds."""

_MATRIX_SIZE = 1024


def read_rate(memory: Tensor) -> float:
    """Bytes per second of one pass over `memory`, on all threads."""
    if native.library() is None:
        return memory.nbytes / _seconds(lambda: memory.sum())
    amount = memory.nbytes // _PIECE_BYTES * _PIECE_BYTES
    return amount / _seconds(lambda: _call("read_memory", memory, amount, torch.float32))


def multiply_rate(dtype: torch.dtype) -> float:
    """Operations per second of all threads, a multiply-add counted as two; int16: into 32 bits."""
    if native.library() is None or dtype not in WEIGHT_CODES:
        matrix = torch.ones(_MATRIX_SIZE, _MATRIX_SIZE, dtype=dtype)
        return 2 * _MATRIX_SIZE**3 / _seconds(lambda: matrix @ matrix)
    operations = _OPERATIONS * torch.get_num_threads()
    return operations / _seconds(lambda: _call("multiply_only", None, _OPERATIONS, dtype))


def _call(name: str, memory: Tensor | None, amount: int, dtype: torch.dtype) -> None:
    out = torch.full((64,), 0.5)
    read = 0 if memory is None else memory.data_ptr()
    arguments = _ARGUMENTS.pack(read, out.data_ptr(), amount, out.numel())
    native.call(name, WEIGHT_CODES[dtype], arguments)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
