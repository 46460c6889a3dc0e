"""What probes and clients see of the server's state: grpc.health, reflection, a closed door."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pilotlight.engine.messages import Progress
from pilotlight.engine.status import EngineState
from pilotlight.proto import inference_pb2 as pb
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.served import Served, details_of, ids_request, served
from pilotlight.tests.server.wire import read, reason_of, refusal

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
READINESS = ("", "readiness", "pilotlight.v1.Inference")


async def _check(s: Served, service: str) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    response = await health_pb2_grpc.HealthStub(s.channel).Check(request)
    status: int = response.status
    return status


def _watch(s: Served, service: str) -> AsyncIterator[Any]:
    request = health_pb2.HealthCheckRequest(service=service)
    return aiter(health_pb2_grpc.HealthStub(s.channel).Watch(request))


async def _next(watch: AsyncIterator[Any]) -> int:
    status: int = (await anext(watch)).status
    return status


# ---- grpc.health -------------------------------------------------------------------------------


async def test_the_server_lives_long_before_it_is_ready() -> None:
    async with served(FakeEngine(boots=False), is_ready=False) as s:
        assert await _check(s, "liveness") == SERVING
        assert [await _check(s, service) for service in READINESS] == [NOT_SERVING] * 3
        s.engine.link.become_ready()
        watch = _watch(s, "readiness")
        while await _next(watch) != SERVING:
            pass
        assert [await _check(s, service) for service in READINESS] == [SERVING] * 3
        assert await _check(s, "liveness") == SERVING


@pytest.mark.parametrize("service", READINESS)
async def test_a_watch_stays_open_through_death_restart_and_drain(service: str) -> None:
    async with served() as s:
        watch = _watch(s, service)
        assert await _next(watch) == SERVING
        s.engine.boots = False
        s.engine.link.end("killed by SIGKILL")
        assert await _next(watch) == NOT_SERVING
        await s.until(lambda: len(s.engine.links) == 2)
        s.engine.link.become_ready()
        assert await _next(watch) == SERVING
        await s.server.drain()
        assert await _next(watch) == NOT_SERVING
        assert await _check(s, "liveness") == SERVING


async def test_a_stalled_engine_is_not_ready_until_it_moves_again() -> None:
    async with served(heartbeat_timeout=0.5) as s:
        watch = _watch(s, "readiness")
        while await _next(watch) != NOT_SERVING:
            pass
        error = await refusal(s.stub.Complete(ids_request([1])))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "STALLED (no heartbeat" in error.details()
        s.engine.link.beat()
        assert await _next(watch) == SERVING


async def test_liveness_does_not_follow_the_engine() -> None:
    async with served(on_engine_failure="exit") as s:
        s.engine.link.end("killed by SIGKILL")
        await s.wait_state(EngineState.FAILED)
        assert await _check(s, "liveness") == SERVING


async def test_an_unknown_service() -> None:
    async with served() as s:
        error = await refusal(_check(s, "no.such.Service"))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert await _next(_watch(s, "no.such.Service")) == SERVICE_UNKNOWN


# ---- reflection --------------------------------------------------------------------------------


async def _reflected(s: Served, **ask: str) -> Any:
    request = reflection_pb2.ServerReflectionRequest(**ask)
    stub = reflection_pb2_grpc.ServerReflectionStub(s.channel)
    [response] = await read(stub.ServerReflectionInfo(iter([request])))
    return response


async def test_reflection_lists_the_services() -> None:
    async with served() as s:
        response = await _reflected(s, list_services="")
    names = {service.name for service in response.list_services_response.service}
    assert {"pilotlight.v1.Inference", "grpc.health.v1.Health"} <= names


async def test_reflection_describes_every_method() -> None:
    async with served() as s:
        response = await _reflected(s, file_containing_symbol="pilotlight.v1.Inference")
    [described] = response.file_descriptor_response.file_descriptor_proto
    for method in pb.DESCRIPTOR.services_by_name["Inference"].methods:
        assert method.name.encode() in described


# ---- the door ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["Generate", "Complete"])
async def test_before_the_model_is_ready_requests_are_told_when_to_come_back(method: str) -> None:
    async with served(FakeEngine(boots=False), is_ready=False) as s:
        error = await refusal(getattr(s.stub, method)(ids_request([1, 2, 3])))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert reason_of(error) == "NOT_READY"
    assert "STARTING" in error.details()
    assert details_of(error)["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == 1.0


async def test_while_weights_are_read_the_pause_is_the_estimate() -> None:
    async with served(FakeEngine(boots=False), is_ready=False) as s:
        await s.until(lambda: s.server.engine.status.phase == "check")
        s.engine.link.say(Progress("load_weights", 0.0, 1, 10_000))
        await s.wait_state(EngineState.LOADING)
        error = await refusal(s.stub.Complete(ids_request([1, 2, 3])))
    assert "LOADING (load_weights)" in error.details()
    # It began at second zero of the machine's clock, so that the estimate is far from the default.
    assert details_of(error)["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 1000


async def test_a_failed_server_says_why() -> None:
    async with served(FakeEngine(boots=False), is_ready=False) as s:
        await s.until(lambda: s.server.engine.status.phase == "check")
        s.engine.link.fail("the folder is empty", is_setup=True)
        await s.wait_state(EngineState.FAILED)
        error = await refusal(s.stub.Complete(ids_request([1, 2, 3])))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "FAILED (the folder is empty)" in error.details()
