"""A server that is told to end: readiness off, door shut, and what was accepted finishes."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pilotlight.engine.messages import Stop
from pilotlight.engine.status import EngineState
from pilotlight.proto import inference_pb2 as pb
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.fake_runner import tokens_alone
from pilotlight.tests.served import Served, details_of, ids_request, served
from pilotlight.tests.server.wire import ids_of, read, reason_of, refusal, submitted

PROMPT = [1, 2, 3]
FOR_EVER_S = 3600.0


async def _readiness_is_off(s: Served) -> None:
    request = health_pb2.HealthCheckRequest(service="readiness")
    async for response in health_pb2_grpc.HealthStub(s.channel).Watch(request):
        if response.status == health_pb2.HealthCheckResponse.NOT_SERVING:
            return


async def _is_refused(s: Served) -> None:
    error = await refusal(s.stub.Generate(ids_request(PROMPT)))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert reason_of(error) == "DRAINING"
    assert "RetryInfo" in details_of(error)
    assert "elsewhere" in error.details()


async def test_a_running_stream_finishes_while_new_work_is_refused() -> None:
    async with served(FakeEngine(is_held=True), drain_timeout=FOR_EVER_S) as s:
        stream = aiter(s.stub.Generate(ids_request(PROMPT, request_id="a")))
        await submitted(s, "a")
        s.engine.link.step()
        first = await anext(stream)
        drain = asyncio.create_task(s.server.drain())
        await _readiness_is_off(s)
        await _is_refused(s)
        info = await s.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert info.state == pb.SERVER_STATE_DRAINING
        assert not drain.done()
        s.engine.link.release()
        chunks = [first, *await read(stream)]
        await drain
    assert ids_of(chunks) == tokens_alone(PROMPT, 8, 200)
    assert chunks[-1].HasField("usage")


async def test_what_is_queued_was_accepted_too() -> None:
    async with served(FakeEngine(is_held=True, max_num_seqs=1), drain_timeout=FOR_EVER_S) as s:
        calls = [s.stub.Complete(ids_request(PROMPT, request_id=f"r{i}")) for i in range(4)]
        for i in range(4):
            await submitted(s, f"r{i}")
        drain = asyncio.create_task(s.server.drain())
        await _readiness_is_off(s)
        s.engine.link.release()
        responses = [await call for call in calls]
        await drain
    assert [r.usage.output_tokens for r in responses] == [8] * 4


async def test_nothing_to_wait_for_is_not_waited_for() -> None:
    async with served(drain_timeout=FOR_EVER_S) as s:
        await s.server.drain()
        await _is_refused(s)


async def test_after_the_time_streams_are_cut_and_told_how_far_they_came() -> None:
    async with served(FakeEngine(is_held=True), drain_timeout=0.0) as s:
        running = aiter(s.stub.Generate(ids_request(PROMPT, request_id="running")))
        await submitted(s, "running")
        s.engine.link.step()
        await anext(running)
        waiting = s.stub.Generate(ids_request(PROMPT, request_id="waiting"))
        await submitted(s, "waiting")
        await s.server.drain()
        assert len(s.server.requests) == 2, "the drain alone ends nothing"
        cut = [asyncio.create_task(refusal(stream)) for stream in (running, waiting)]
        await s.server.stop()
        errors = [await task for task in cut]
    assert [error.code() for error in errors] == [
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.UNAVAILABLE,
    ]
    sent = [details_of(error)["ErrorInfo"].metadata["tokens_sent"] for error in errors]
    assert sent == ["1", "0"]
    assert s.server.engine.status.state is EngineState.STOPPED
    assert Stop() in s.engine.link.received


async def test_in_the_lag_readiness_is_off_and_the_door_still_open() -> None:
    """For load balancers that look rarely: they send on until they have looked."""
    async with served(drain_lag=FOR_EVER_S) as s:
        drain = asyncio.create_task(s.server.drain())
        await _readiness_is_off(s)
        response = await s.stub.Complete(ids_request(PROMPT))
        assert response.usage.output_tokens == 8
        drain.cancel()


async def test_a_drain_before_the_model_is_ready() -> None:
    async with served(FakeEngine(boots=False), is_ready=False, drain_timeout=FOR_EVER_S) as s:
        watch = s.stub.WatchStartup(pb.WatchStartupRequest())
        await s.server.drain()
        assert (await read(watch))[-1].state == pb.SERVER_STATE_DRAINING
        await _is_refused(s)


@pytest.mark.parametrize("boots", [True, False])
async def test_an_engine_that_died_during_the_drain_does_not_come_back_ready(boots: bool) -> None:
    async with served() as s:
        await s.server.drain()
        s.engine.boots = boots
        s.engine.link.end("killed by SIGKILL")
        await s.until(lambda: len(s.engine.links) == 2)
        await s.wait_state(EngineState.READY if boots else EngineState.STARTING)
        assert not s.server.lifecycle.is_ready
        await _is_refused(s)
