"""How `pilotlight bench serving` comes to its server: none there, one that loads, one that ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pilotlight.bench import serving
from pilotlight.engine.messages import Boot
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.served import LIMIT_S, Served, served

SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
NOT_SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)


class Readiness(health_pb2_grpc.HealthServicer):
    """A server's readiness, off until the test says how it goes on. Serves nothing else."""

    def __init__(self) -> None:
        self.is_watched = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.reason = ""
        """Why the server ends; empty: it becomes ready."""

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        assert request.service == "readiness"
        yield NOT_SERVING
        self.is_watched.set()
        await self.goes_on.wait()
        if self.reason:
            await context.abort(grpc.StatusCode.UNAVAILABLE, self.reason)
        yield SERVING


@asynccontextmanager
async def watched(readiness: Readiness) -> AsyncIterator[asyncio.Task[int]]:
    """A bench that waits for `readiness`, and has seen that it is off."""
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(readiness, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    task = asyncio.create_task(bench(port, "--wait-ready", str(LIMIT_S)))
    try:
        async with asyncio.timeout(LIMIT_S):
            await readiness.is_watched.wait()
            yield task
    finally:
        task.cancel()
        await server.stop(grace=None)


async def bench(port: int, *words: str) -> int:
    target = f"127.0.0.1:{port}"
    fixed = ("--rate", "inf", "--num-requests", "3", "--input-len", "6", "--output-len", "4")
    async with asyncio.timeout(LIMIT_S):
        return await serving.run(serving.parse(["--target", target, *fixed, *words]))


async def has_booting_engine(s: Served) -> None:
    links = s.engine.links
    await s.until(lambda: links and any(isinstance(m, Boot) for m in links[-1].received))


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port of loopback that is taken, and on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


# ---- no server -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "no answer from 127.0.0.1:{port} (UNAVAILABLE); is `pilotlight serve` running there?"),
        (("--wait-ready", "0.05"), "127.0.0.1:{port} was not ready within 0.05 s"),
    ],
)
def test_no_server_is_one_line_and_exit_code_1(
    silent_port: int, words: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --wait-ready a server that is not there yet is waited for."""
    assert serving.main(["--target", f"127.0.0.1:{silent_port}", "--rate", "1", *words]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"pilotlight bench serving: {reason.format(port=silent_port)}\n"


# ---- one that loads --------------------------------------------------------------------------


async def test_a_server_that_is_loading_is_told_apart_from_none() -> None:
    async with served(FakeEngine(boots=False), is_ready=False) as s:
        with pytest.raises(serving.Unreachable, match="still loading its model; --wait-ready"):
            await bench(s.server.port)


async def test_a_server_that_is_loading_can_be_waited_for() -> None:
    async with served(FakeEngine(boots=False), is_ready=False) as s:
        task = asyncio.create_task(bench(s.server.port, "--wait-ready", str(LIMIT_S)))
        await has_booting_engine(s)
        s.engine.link.become_ready()
        assert await task == 0


async def test_nothing_is_asked_before_the_server_is_ready() -> None:
    readiness = Readiness()
    async with watched(readiness) as task:
        assert not task.done()
        readiness.goes_on.set()
        with pytest.raises(serving.Unreachable, match=r"no answer from .* \(UNIMPLEMENTED\)"):
            await task


async def test_a_server_that_stays_unready_is_given_up() -> None:
    async with served(FakeEngine(boots=False), is_ready=False) as s:
        with pytest.raises(serving.Unreachable, match=r"was not ready within 0\.05 s"):
            await bench(s.server.port, "--wait-ready", "0.05")


# ---- one that ends ---------------------------------------------------------------------------


async def test_a_server_that_ends_instead_of_becoming_ready_is_told() -> None:
    readiness = Readiness()
    async with watched(readiness) as task:
        readiness.reason = "no memory"
        readiness.goes_on.set()
        reason = r"ended before it was ready \(UNAVAILABLE: no memory\)"
        with pytest.raises(serving.Unreachable, match=reason):
            await task


async def test_an_interrupt_while_waiting_ends_the_wait() -> None:
    async with watched(Readiness()) as task:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
