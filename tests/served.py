"""A whole server on loopback with a fake engine, and a client's channel to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from pilotlight.engine.status import EngineState
from pilotlight.proto import inference_pb2 as pb
from pilotlight.proto import inference_pb2_grpc as pb_grpc
from pilotlight.server.config import ServeConfig
from pilotlight.server.main import Server
from pilotlight.server.ports import address_of
from pilotlight.tests.fake_engine import FakeEngine

LIMIT_S = 20.0
"""Every wait in a test ends: a hang is a failure, not a stuck run."""
TEST_LIMIT_S = 60.0
"""The same for all that a test does with its server."""

DEFAULTS = {
    "port": 0,
    "ops_port": 0,
    "restart_backoff": 0.0,
    "cache": "off",
    # A fake engine beats only when told to; a busy machine must not make it look stalled.
    "heartbeat_timeout": 3600.0,
}


class Served:
    """The server, its fake engine, and stubs for a client."""

    def __init__(self, server: Server, engine: FakeEngine, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.engine = engine
        self.channel = channel
        self.stub = pb_grpc.InferenceStub(channel)

    async def wait_state(self, state: EngineState) -> None:
        async with asyncio.timeout(LIMIT_S):
            async for status in self.server.engine.status_changes():
                if status.state is state:
                    return

    async def until(self, holds: Any) -> None:
        """Waits, without sleeping on a clock, until `holds()`."""
        async with asyncio.timeout(LIMIT_S):
            while not holds():
                await asyncio.sleep(0)


@asynccontextmanager
async def served(
    engine: FakeEngine | None = None, is_ready: bool = True, **options: Any
) -> AsyncIterator[Served]:
    """A server with `options` of ServeConfig; READY and with its text loaded unless told not to."""
    engine = engine or FakeEngine()
    server = Server(ServeConfig(**{**DEFAULTS, **options}), time.monotonic(), engine.launch)
    async with asyncio.timeout(TEST_LIMIT_S):
        await server.start()
        host = str(options.get("host", "127.0.0.1"))
        async with grpc.aio.insecure_channel(address_of(host, server.port)) as channel:
            handle = Served(server, engine, channel)
            try:
                if is_ready:
                    await handle.wait_state(EngineState.READY)
                    await handle.until(lambda: server.text.is_loaded)
                yield handle
            finally:
                await server.stop()


def ids_request(ids: list[int], max_tokens: int = 8, **fields: Any) -> pb.GenerateRequest:
    """Greedy, by token ids."""
    request = pb.GenerateRequest(**fields)
    request.token_ids.ids.extend(ids)
    request.sampling.temperature = 0.0
    request.stop.max_tokens = max_tokens
    request.stop.ignore_eos = True
    return request


def details_of(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The google.rpc details of a status, by the name of their type."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for packed in status.details if status else ():
        detail = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])()
        packed.Unpack(detail)
        found[detail.DESCRIPTOR.name] = detail
    return found
