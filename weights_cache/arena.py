"""The arena artefact: all tensors of a model in one file, laid out to be mapped; how to read it.

    "PLARENA1" | u64 bytes of the header | xxh3-128 of the header | header | data
    header = JSON of ArenaHeader, and spaces up to a multiple of 4 KiB
    data   = from the next multiple of 2 MiB on: sections, each at a multiple of 2 MiB; tensors in
             them at multiples of 64 B

Every byte that anyone reads lies under one hash, and reading believes none of them: what is not
exactly what the writer would have written is refused. The hashes find damage; they are no
signature. Knows files and bytes; no torch, no model, no store.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated

import msgspec
import xxhash

from ..engine.errors import BadArtefact
from .files import FileSystem
from .manifest import ITEM_BYTES

FORMAT = 1
MAGIC = b"PLARENA1"
PREFIX = struct.Struct("<8sQ16s")
MAX_HEADER_BYTES = 64 << 20
SECTION_BYTES = 2 << 20
"""A section and the data itself start at its multiples: huge pages, and any O_DIRECT."""
TENSOR_BYTES = 64
BLOCK_BYTES = 4096
"""The data ends at its multiple, and chunks are multiples of it: whole blocks for O_DIRECT."""
CHUNK_BYTES = 8 << 20

_HASH = re.compile(r"[0-9a-f]{32}")
MAX_SIZE = (1 << 62) - 1
Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
Shape = Annotated[tuple[Size, ...], msgspec.Meta(max_length=8)]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written. `shape` and `dtype` (safetensors' names) are those of the stored
    bytes, whatever `layout` means by them; tensors of one `section` lie side by side."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: str
    section: str
    num_bytes: int


class ArenaTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor in the file: `num_bytes` from `offset` on, which counts from the data's start."""

    name: Text
    dtype: Text
    shape: Shape
    layout: Text
    offset: Size
    num_bytes: Size

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


class ArenaHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    key: Text
    chunk_bytes: Size
    data_offset: Size
    data_bytes: Size
    chunk_hashes: tuple[str, ...]
    tensors: tuple[ArenaTensor, ...]
    about: dict[str, str]

    @property
    def file_bytes(self) -> int:
        return self.data_offset + self.data_bytes

    @property
    def num_chunks(self) -> int:
        return -(-self.data_bytes // self.chunk_bytes)


# ---- laying out, which reading checks against ---------------------------------------------------


def round_up(num_bytes: int, unit: int) -> int:
    return -(-num_bytes // unit) * unit


def lay_out(specs: Sequence[TensorSpec]) -> tuple[ArenaTensor, ...]:
    """Offsets in the order given."""
    tensors: list[ArenaTensor] = []
    end, section = 0, None
    for spec in specs:
        offset = round_up(end, TENSOR_BYTES if spec.section == section else SECTION_BYTES)
        tensors.append(
            ArenaTensor(spec.name, spec.dtype, spec.shape, spec.layout, offset, spec.num_bytes)
        )
        end, section = offset + spec.num_bytes, spec.section
    return tuple(tensors)


def plan_header(
    key: str, tensors: tuple[ArenaTensor, ...], about: Mapping[str, str], chunk_bytes: int
) -> ArenaHeader:
    """The header with zeros for hashes: as long as it will be with them. Raises ValueError."""
    data_bytes = round_up(tensors[-1].end if tensors else 0, BLOCK_BYTES)
    num_chunks = -(-data_bytes // chunk_bytes)
    hashes = ("0" * 32,) * num_chunks
    header = ArenaHeader(FORMAT, key, chunk_bytes, 0, data_bytes, hashes, tensors, dict(about))
    header = msgspec.structs.replace(header, data_offset=_data_offset_of(header))
    problem = _problem_of(header)
    if problem:
        raise ValueError(f"this is no arena: {problem}")
    return header


def encode_header(header: ArenaHeader) -> bytes:
    """The first bytes of the file; between them and the data are zeros."""
    raw = msgspec.json.encode(header)
    raw = raw.ljust(round_up(PREFIX.size + len(raw), BLOCK_BYTES) - PREFIX.size)
    return PREFIX.pack(MAGIC, len(raw), xxhash.xxh3_128_digest(raw)) + raw


def _data_offset_of(header: ArenaHeader) -> int:
    """Behind the longest text that this header may have."""
    longest = msgspec.structs.replace(header, data_offset=MAX_SIZE)
    return round_up(PREFIX.size + len(msgspec.json.encode(longest)), SECTION_BYTES)


# ---- reading ------------------------------------------------------------------------------------


class Arena:
    """An open artefact. What was mapped stays mapped after `close`, as long as anyone uses it."""

    def __init__(self, files: FileSystem, path: Path, descriptor: int, header: ArenaHeader) -> None:
        self.files = files
        self.path = path
        self.descriptor = descriptor
        self.header = header
        self.tensors: Mapping[str, ArenaTensor] = {t.name: t for t in header.tensors}
        self._mapping: mmap.mmap | None = None
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Of data, as verified and loaded."""
        return self.header.data_bytes

    def map(self) -> mmap.mmap:
        """The data, read-only; the same mapping at every call."""
        with self._lock:
            if self._mapping is None:
                header = self.header
                self._mapping = self.files.map(
                    self.descriptor, header.data_bytes, header.data_offset
                )
            return self._mapping

    def resident(self, start: int, num_bytes: int) -> memoryview:
        """That part of the data, in memory. Raises OSError where the disk or the file ends it."""
        mapping = self.map()
        if self.files.populate(mapping, start, num_bytes):
            return memoryview(mapping)[start : start + num_bytes]
        data = memoryview(bytearray(num_bytes))
        found = self.files.read_into(self.descriptor, data, self.header.data_offset + start)
        return data[:found]

    def chunk(self, index: int) -> tuple[int, int]:
        """Where chunk `index` of the data starts, and how many bytes it has."""
        start = index * self.header.chunk_bytes
        return start, min(self.header.chunk_bytes, self.header.data_bytes - start)

    def check_chunk(self, index: int, data: bytes | bytearray | memoryview | mmap.mmap) -> None:
        """Raises BadArtefact unless `data` is chunk `index`. Other threads run meanwhile."""
        if xxhash.xxh3_128_hexdigest(data) != self.header.chunk_hashes[index]:
            start, num_bytes = self.chunk(index)
            first = self.header.data_offset + start
            raise BadArtefact(
                f"{self.path} is damaged: chunk {index} (bytes {first} to {first + num_bytes}) is "
                "not what was written"
            )

    def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            self.files.close(descriptor)

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_arena(path: Path, files: FileSystem | None = None) -> Arena:
    """Opens an artefact and checks its header. Raises BadArtefact."""
    try:
        return open_arena(files or FileSystem(), path)
    except OSError as error:
        raise BadArtefact(f"{path} cannot be read: {error.strerror}") from error


def open_arena(files: FileSystem, path: Path) -> Arena:
    """As read_arena; what the file system refuses stays an OSError."""
    descriptor = files.open(path, os.O_RDONLY)
    try:
        header = _read_header(files, path, descriptor)
    except BaseException:
        files.close(descriptor)
        raise
    return Arena(files, path, descriptor, header)


def _read_header(files: FileSystem, path: Path, descriptor: int) -> ArenaHeader:
    file_bytes = files.fstat(descriptor).st_size
    magic, header_bytes, digest = PREFIX.unpack(
        _read_exactly(files, path, descriptor, PREFIX.size, 0)
    )
    if magic != MAGIC:
        raise BadArtefact(f"{path} is no arena: it starts with {magic!r}")
    if header_bytes > MAX_HEADER_BYTES or PREFIX.size + header_bytes > file_bytes:
        raise BadArtefact(f"{path} has {file_bytes} B and claims a header of {header_bytes} B")
    raw = _read_exactly(files, path, descriptor, header_bytes, PREFIX.size)
    if xxhash.xxh3_128_digest(raw) != digest:
        raise BadArtefact(f"{path} is damaged: its header is not what was written")
    return decode_header(raw, file_bytes, path)


def decode_header(raw: bytes, file_bytes: int, path: Path) -> ArenaHeader:
    """A header that keeps every promise of the format. Raises BadArtefact."""
    try:
        header = msgspec.json.decode(raw, type=ArenaHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadArtefact(f"{path} has no header of an arena ({error})") from error
    problem = _problem_of(header)
    if not problem and encode_header(header)[PREFIX.size :] != raw:
        problem = "the header is not written as the writer writes it"
    if not problem and header.file_bytes != file_bytes:
        problem = f"the file has {file_bytes} bytes, its header speaks of {header.file_bytes}"
    if problem:
        raise BadArtefact(f"{path}: {problem}")
    return header


def _read_exactly(
    files: FileSystem, path: Path, descriptor: int, num_bytes: int, offset: int
) -> bytes:
    data = bytearray(num_bytes)
    found = files.read_into(descriptor, memoryview(data), offset)
    if found != num_bytes:
        raise BadArtefact(f"{path} is truncated: {offset + found} bytes, its header needs more")
    return bytes(data)


def _problem_of(header: ArenaHeader) -> str:
    """Empty if the header's numbers and names fit together."""
    return next((problem for problem in _problems(header) if problem), "")


def _problems(header: ArenaHeader) -> Iterator[str]:
    if header.format != FORMAT:
        yield f"format {header.format} is not {FORMAT}, which this version reads"
    if not 0 < header.chunk_bytes <= 1 << 30 or header.chunk_bytes % BLOCK_BYTES:
        yield f"chunks of {header.chunk_bytes} bytes"
    if header.data_offset != _data_offset_of(header) or header.data_offset > MAX_HEADER_BYTES:
        yield f"the data starts at {header.data_offset}"
    if header.data_bytes == 0:
        yield "no tensor has a byte"
    if len(header.chunk_hashes) != header.num_chunks:
        yield f"{len(header.chunk_hashes)} hashes for {header.num_chunks} chunks"
    if not all(_HASH.fullmatch(digest) for digest in header.chunk_hashes):
        yield "a hash is malformed"
    yield from _layout_problems(header)


def _layout_problems(header: ArenaHeader) -> Iterator[str]:
    end = 0
    names: set[str] = set()
    for tensor in header.tensors:
        yield from _tensor_problems(tensor)
        if tensor.name in names:
            yield f"{tensor.name} appears twice"
        if tensor.offset not in (round_up(end, TENSOR_BYTES), round_up(end, SECTION_BYTES)):
            what = (
                "overlaps the tensor before it" if tensor.offset < end else "lies at a wrong byte"
            )
            yield f"{tensor.name} {what} ({tensor.offset})"
        names.add(tensor.name)
        end = tensor.end
    if header.data_bytes != round_up(end, BLOCK_BYTES):
        yield f"the data has {header.data_bytes} bytes, its last tensor ends at {end}"


def _tensor_problems(tensor: ArenaTensor) -> Iterator[str]:
    if tensor.dtype not in ITEM_BYTES:
        yield f"{tensor.name} has the unknown dtype {tensor.dtype!r}"
    elif math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype] != tensor.num_bytes:
        yield (
            f"{tensor.name} of shape {list(tensor.shape)} and dtype {tensor.dtype} does not have "
            f"{tensor.num_bytes} bytes"
        )
