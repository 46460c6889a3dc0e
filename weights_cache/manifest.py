"""What a safetensors checkpoint holds: files, tensor names, types, shapes and byte spans.

Reads headers only and believes nothing in them. Knows files and bytes; no torch, no model.
Format: https://huggingface.co/docs/safetensors (u64 header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
"""The reference implementation's own cap."""

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """One tensor: bytes [start, end) of `file`, `shape` of `dtype` (safetensors' names)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Manifest:
    """Every tensor of a checkpoint by name."""

    tensors: Mapping[str, TensorSpan]

    @property
    def num_bytes(self) -> int:
        return sum(t.num_bytes for t in self.tensors.values())


def read_manifest(folder: Path) -> Manifest:
    """Reads all headers of the checkpoint in `folder`. Raises CheckpointError."""
    if (folder / INDEX_NAME).is_file():
        return _read_sharded(folder)
    if (folder / SINGLE_NAME).is_file():
        return Manifest(read_header(folder / SINGLE_NAME))
    raise CheckpointError(_why_nothing(folder))


def _why_nothing(folder: Path) -> str:
    if not folder.is_dir():
        return (
            f"there is no folder {folder}; a model is a checkpoint's folder, hf://org/name, or the "
            "https:// or s3:// address of such a folder"
        )
    others = sorted(
        p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".gguf"}
    )
    if others:
        return (
            f"{folder} holds {others[0]} but no {SINGLE_NAME}: only safetensors are read, because "
            "the other formats can run code; convert it with transformers' save_pretrained"
        )
    return f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}"


def _read_sharded(folder: Path) -> Manifest:
    file_of = _read_index(folder / INDEX_NAME)
    tensors: dict[str, TensorSpan] = {}
    for file in sorted(set(file_of.values())):
        for name, span in read_header(folder / file).items():
            if file_of.get(name) != file:
                raise CheckpointError(f"{file} holds {name}, which {INDEX_NAME} places elsewhere")
            tensors[name] = span
    missing = sorted(file_of.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"{file_of[missing[0]]} lacks {missing[0]}, which the index promises")
    return Manifest(tensors)


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        items = dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors index ({error!r})") from error
    for name, file in items.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path} places {name} in {file!r}: not a file of this folder")
        if not (path.parent / file).is_file():
            raise CheckpointError(f"{path.parent / file} is missing; {INDEX_NAME} names it")
    return items


def read_header(path: Path) -> dict[str, TensorSpan]:
    """The tensors of one file, with every promise of the format checked."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= header_bytes <= MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is not a safetensors file (header of {header_bytes} B)")
        if 8 + header_bytes > file_bytes:
            raise CheckpointError(f"{path} is truncated: its header alone needs {header_bytes} B")
        raw = file.read(header_bytes)
    spans = [_span(path, 8 + header_bytes, *item) for item in _parse(path, raw).items()]
    _check_layout(path, spans, 8 + header_bytes, file_bytes)
    return {span.name: span for span in spans}


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            raise ValueError("a key appears twice")
        return content

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file (its header is no object)")
    header.pop("__metadata__", None)
    return header


def _span(path: Path, data_start: int, name: str, entry: Any) -> TensorSpan:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: the header entry of {name} is malformed") from error
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{path}: {name} has the unknown dtype {dtype!r}")
    sizes = (*shape, start, end) if isinstance(shape, list) else (None,)
    if not all(type(n) is int and 0 <= n < 2**63 for n in sizes):
        raise CheckpointError(f"{path}: {name} has a shape or offset that is no size")
    if math.prod(shape) * ITEM_BYTES[dtype] != end - start:
        raise CheckpointError(
            f"{path}: {name} of shape {list(shape)} and dtype {dtype} needs "
            f"{math.prod(shape) * ITEM_BYTES[dtype]} bytes, its span has {end - start}"
        )
    return TensorSpan(name, path, dtype, tuple(shape), data_start + start, data_start + end)


def _check_layout(path: Path, spans: list[TensorSpan], start: int, file_bytes: int) -> None:
    """Spans tile the data exactly: no hole, no overlap, nothing behind."""
    at = start
    for span in sorted(spans, key=lambda s: (s.start, s.end)):
        if span.start != at:
            what = "overlaps the tensor before it" if span.start < at else "leaves a hole before it"
            raise CheckpointError(f"{path}: {span.name} {what}")
        at = span.end
    if at > file_bytes:
        raise CheckpointError(f"{path} is truncated: {file_bytes} bytes of {at}")
    if at < file_bytes:
        raise CheckpointError(f"{path} has {file_bytes - at} bytes behind its last tensor")
