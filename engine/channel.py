"""The wire between front and engine: length-prefixed msgpack records over a socket pair.

Knows the messages and bytes; knows no sockets and no threads. A frame is a 4-byte little-endian
length and that many bytes of msgpack.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import msgspec

from .errors import EngineError
from .messages import FromEngine, ToEngine

LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 1 << 28

Message = TypeVar("Message")

_encoder = msgspec.msgpack.Encoder()


def frame(message: ToEngine | FromEngine) -> bytes:
    """One message as it goes over the wire."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise EngineError(f"a message of {len(body)} bytes is above {MAX_FRAME_BYTES}")
    return LENGTH.pack(len(body)) + body


class FrameReader(Generic[Message]):
    """Cuts a stream of bytes, in whatever pieces it comes, into typed messages."""

    def __init__(self, decode: Callable[[bytes | bytearray | memoryview], Message]) -> None:
        self._decode = decode
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Messages completed by `data`. Raises EngineError where the stream makes no sense."""
        self._pending += data
        while (body := self._take()) is not None:
            try:
                yield self._decode(body)
            except msgspec.MsgspecError as error:
                raise EngineError(f"the other end sent no message: {error}") from error

    def _take(self) -> bytes | None:
        if len(self._pending) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._pending)
        if length > MAX_FRAME_BYTES:
            raise EngineError(f"the other end announced {length} bytes")
        end = LENGTH.size + length
        if len(self._pending) < end:
            return None
        body = bytes(self._pending[LENGTH.size : end])
        del self._pending[:end]
        return body


def reader_in_engine() -> FrameReader[ToEngine]:
    return FrameReader(msgspec.msgpack.Decoder(ToEngine).decode)


def reader_in_front() -> FrameReader[FromEngine]:
    return FrameReader(msgspec.msgpack.Decoder(FromEngine).decode)
