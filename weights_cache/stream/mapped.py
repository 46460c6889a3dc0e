"""Tensors out of a checkpoint's files, without a copy: views of read-only mappings.

Where the processor computes, nothing needs to move.
"""

from __future__ import annotations

import mmap
import warnings
from pathlib import Path

import torch

from ..arena import Arena
from ..manifest import Manifest, TensorSpan

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip


class MappedArena:
    """The tensors of an artefact by name: views of one read-only mapping, none of them copied."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._mapping = arena.map()

    def tensor(self, name: str) -> torch.Tensor:
        stored = self._arena.tensors[name]
        dtype = TORCH_DTYPES[stored.dtype]
        if stored.num_bytes == 0:
            return torch.empty(stored.shape, dtype=dtype)
        num_items = stored.num_bytes // dtype.itemsize
        return _view(self._mapping, dtype, num_items, stored.offset).view(stored.shape)


class MappedWeights:
    """The tensors of a manifest by name. They are read-only: writing to one is a crash."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._mappings: dict[Path, mmap.mmap] = {}

    def find(self, name: str) -> torch.Tensor | None:
        """The tensor, or None where there is no such."""
        return self.tensor(name) if name in self._manifest.tensors else None

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the file's pages, which are read when they are first touched."""
        span = self._manifest.tensors[name]
        dtype = TORCH_DTYPES[span.dtype]
        if span.num_bytes == 0:
            return torch.empty(span.shape, dtype=dtype)
        mapping = self._mapping(span)
        num_items = span.num_bytes // dtype.itemsize
        if span.start % dtype.itemsize:
            # torch reads such a buffer, but vector loads of some kernels would not.
            return self._copied(mapping, span, dtype)
        return _view(mapping, dtype, num_items, span.start).view(span.shape)

    def _copied(self, mapping: mmap.mmap, span: TensorSpan, dtype: torch.dtype) -> torch.Tensor:
        data = bytearray(mapping[span.start : span.end])
        return torch.frombuffer(data, dtype=dtype).view(span.shape)

    def _mapping(self, span: TensorSpan) -> mmap.mmap:
        if span.file not in self._mappings:
            with span.file.open("rb") as file:
                self._mappings[span.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._mappings[span.file]


def _view(mapping: mmap.mmap, dtype: torch.dtype, num_items: int, offset: int) -> torch.Tensor:
    with warnings.catch_warnings():
        # torch warns that the buffer is read-only; that is the point of it.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(mapping, dtype=dtype, count=num_items, offset=offset)
