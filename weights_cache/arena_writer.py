"""Writes an arena: offsets known beforehand, hashes taken as bytes pass, room reserved first.

Beside the file lies a journal, one line for each finished chunk. A writer that comes after one
that ended in any way hashes those chunks again and goes on behind the last good one; so nothing
needs to reach the disk before `finish`. Memory is bounded by the pieces that the caller hands in.
Knows the format and bytes; nothing of where they come from.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from types import TracebackType

import msgspec
import xxhash

from ..engine.errors import NotEnoughDisk
from .arena import CHUNK_BYTES, ArenaTensor, TensorSpec, encode_header, lay_out, plan_header
from .disk_errors import WAY_OUT, disk_errors
from .files import FileSystem

JOURNAL_SUFFIX = ".journal"
_LINE = re.compile(rb"[0-9a-f]{32}\n")
_LINE_BYTES = 33
_ZEROS = memoryview(bytes(1 << 20))
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class ArenaWriter:
    """As a context: `write` every tensor in the order of `specs`; leaving finishes the file.

    An exception leaves the file as it is, to be continued. One writer for a path at a time.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        specs: Sequence[TensorSpec],
        about: Mapping[str, str],
        files: FileSystem | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.path = path
        self._files = files or FileSystem()
        self._header = plan_header(key, lay_out(specs), about, chunk_bytes)
        self._tensors = self._header.tensors
        self._index = 0
        """Of the tensor that is being written."""
        self._cursor = 0
        """How far in the data the caller is."""
        self._end = 0
        """How far in the data the file is good: ahead of the cursor after a resumption."""
        self._hashes: list[str] = []
        self._hasher = xxhash.xxh3_128()
        self._descriptor = -1
        self._journal = -1

    @property
    def num_bytes(self) -> int:
        return self._header.data_bytes

    @property
    def num_bytes_done(self) -> int:
        """Good on the disk, or on their way there."""
        return self._end

    def is_written(self, name: str) -> bool:
        """Kept from an earlier writer, or written by this one: it need not be written (again)."""
        return next(t.end for t in self._tensors if t.name == name) <= self._end

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """The next bytes of tensor `name`: all of them, or piece after piece."""
        piece = memoryview(data).cast("B")
        tensor = self._advance_to(name)
        assert tensor is not None
        if self._cursor + len(piece) > tensor.end:
            raise ValueError(f"{name} has {tensor.num_bytes} bytes; more were written")
        self._feed(piece)

    def finish(self) -> None:
        """Every tensor is written: the header follows, and all of it reaches the disk."""
        self._advance_to(None)
        self._fill(self._header.data_bytes)
        header = msgspec.structs.replace(self._header, chunk_hashes=tuple(self._hashes))
        with disk_errors(self.path):
            self._files.write_all(self._descriptor, encode_header(header), 0)
            try:
                self._files.fsync(self._descriptor)
            except OSError:
                # What the page cache holds may never have reached the disk: believe none of it.
                self._forget_journal()
                raise
            self._forget_journal()

    # ---- the caller's place ------------------------------------------------------------------

    def _advance_to(self, name: str | None) -> ArenaTensor | None:
        """Past tensors that are whole, with zeros up to the next one; None: past all of them."""
        while self._index < len(self._tensors):
            tensor = self._tensors[self._index]
            self._fill(tensor.offset)
            if tensor.name == name:
                return tensor
            if max(self._end, self._cursor) < tensor.end:
                raise ValueError(f"{tensor.name} is not whole yet, {name or 'the end'} comes later")
            self._cursor = max(self._cursor, tensor.end)
            self._index += 1
        if name is not None:
            raise ValueError(f"{name} is no tensor that is still to come")
        return None

    def _fill(self, end: int) -> None:
        while self._cursor < end:
            self._feed(_ZEROS[: end - self._cursor])

    def _feed(self, piece: memoryview) -> None:
        """Bytes at the cursor. Those that are in the file already are passed over."""
        if self._cursor > self._end:
            raise ValueError(f"an earlier write to {self.path} failed")
        num_kept = min(self._end - self._cursor, len(piece))
        self._cursor += len(piece)
        with disk_errors(self.path):
            self._append(piece[num_kept:])

    # ---- the file ----------------------------------------------------------------------------

    def _append(self, piece: memoryview) -> None:
        while len(piece):
            chunk_end = min(self._chunk_start(len(self._hashes) + 1), self._header.data_bytes)
            part = piece[: chunk_end - self._end]
            self._files.write_all(self._descriptor, part, self._header.data_offset + self._end)
            self._hasher.update(part)
            self._end += len(part)
            piece = piece[len(part) :]
            if self._end == chunk_end:
                self._end_chunk()

    def _chunk_start(self, index: int) -> int:
        return index * self._header.chunk_bytes

    def _end_chunk(self) -> None:
        self._hashes.append(self._hasher.hexdigest())
        self._hasher = xxhash.xxh3_128()
        self._write_line(len(self._hashes), self._hashes[-1])

    # ---- begin and end -----------------------------------------------------------------------

    def __enter__(self) -> ArenaWriter:
        try:
            with disk_errors(self.path):
                self._descriptor = self._files.open(self.path, os.O_RDWR | os.O_CREAT)
                self._resume()
                self._reserve()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self._close()

    def _close(self) -> None:
        descriptors = (self._descriptor, self._journal)
        self._descriptor = self._journal = -1
        for descriptor in descriptors:
            if descriptor >= 0:
                self._files.close(descriptor)

    def _reserve(self) -> None:
        """All the room that the file will need, or NotEnoughDisk before a byte is written."""
        kept, whole = self._header.data_offset + self._end, self._header.file_bytes
        self._files.ftruncate(self._descriptor, kept)
        needed = whole - self._files.fstat(self._descriptor).st_blocks * 512
        free = self._files.free_bytes(self.path.parent)
        if needed > free:
            raise NotEnoughDisk(
                f"{self.path.parent} has {free} bytes free, the artefact needs {needed}; {WAY_OUT}"
            )
        try:
            self._files.fallocate(self._descriptor, whole)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                with suppress(OSError):
                    self._files.ftruncate(self._descriptor, kept)
                raise
            self._files.ftruncate(self._descriptor, whole)

    # ---- the journal -------------------------------------------------------------------------

    def _resume(self) -> None:
        for digest in self._read_journal()[: self._header.num_chunks]:
            if self._hash_of_next_chunk() != digest:
                break
            self._hashes.append(digest)
            self._end = min(self._chunk_start(len(self._hashes)), self._header.data_bytes)
        self._journal = self._files.open(self._journal_path, os.O_RDWR | os.O_CREAT)
        self._files.ftruncate(self._journal, _LINE_BYTES * (1 + len(self._hashes)))
        self._write_line(0, self._fingerprint)

    def _hash_of_next_chunk(self) -> str:
        end = min(self._end + self._header.chunk_bytes, self._header.data_bytes)
        data = memoryview(bytearray(end - self._end))
        try:
            found = self._files.read_into(
                self._descriptor, data, self._header.data_offset + self._end
            )
        except OSError:
            return ""
        return xxhash.xxh3_128_hexdigest(data[:found])

    def _read_journal(self) -> list[str]:
        """The hashes of finished chunks, if they are of this key and layout."""
        try:
            raw = self._files.read(self._journal_path)
        except OSError:
            return []
        lines = [raw[at : at + _LINE_BYTES] for at in range(0, len(raw), _LINE_BYTES)]
        if not lines or lines[0] != self._fingerprint.encode() + b"\n":
            return []
        return [line[:-1].decode() for line in takewhile(_LINE.fullmatch, lines[1:])]

    def _write_line(self, index: int, digest: str) -> None:
        self._files.write_all(self._journal, digest.encode() + b"\n", index * _LINE_BYTES)

    def _forget_journal(self) -> None:
        self._files.unlink(self._journal_path, missing_ok=True)

    @property
    def _journal_path(self) -> Path:
        return self.path.with_name(self.path.name + JOURNAL_SUFFIX)

    @property
    def _fingerprint(self) -> str:
        header = msgspec.structs.replace(self._header, about={})
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode(header))
