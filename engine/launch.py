"""The front's end of an engine's channel, and how one is launched. Knows no requests."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from .channel import frame, reader_in_front
from .messages import FromEngine, ToEngine
from .spawn import Spawned, spawn


class EngineLink(Protocol):
    """A running engine, as its client sees it."""

    @property
    def pid(self) -> int: ...

    @property
    def spawned_s(self) -> float:
        """time.monotonic() when its process was started."""

    def send(self, message: ToEngine) -> None:
        """Never blocks and never fails: what a dead engine does not get, nobody misses."""

    def messages(self) -> AsyncIterator[FromEngine]:
        """Everything the engine says, until its end of the channel is closed."""

    def kill(self) -> None: ...

    async def wait(self) -> str:
        """Waits for the process to end; says how it did."""


Launch = Callable[[], Awaitable[EngineLink]]


class ProcessLink:
    """An engine in a process of its own."""

    def __init__(
        self,
        spawned: Spawned,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = spawned.process
        self.spawned_s = spawned.at_s
        self._reader = reader
        self._writer = writer

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    async def messages(self) -> AsyncIterator[FromEngine]:
        frames = reader_in_front()
        while data := await self._received():
            for message in frames.feed(data):
                yield message

    async def _received(self) -> bytes:
        try:
            return await self._reader.read(1 << 20)
        except OSError:
            return b""

    def kill(self) -> None:
        # SIGKILL also ends a process that is stopped.
        self._process.kill()

    async def wait(self) -> str:
        code = await asyncio.to_thread(self._process.wait)
        self._writer.close()
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


async def launch_process() -> EngineLink:
    return await linked(spawn())


async def linked(spawned: Spawned) -> EngineLink:
    """The channel of a process that runs already."""
    spawned.socket.setblocking(False)
    reader, writer = await asyncio.open_unix_connection(sock=spawned.socket)
    return ProcessLink(spawned, reader, writer)
