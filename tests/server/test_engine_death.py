"""The engine dies: every stream ends with a status that says what to do; then it is back or not."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from pilotlight.engine.messages import FinishReason
from pilotlight.engine.status import EngineState
from pilotlight.proto import inference_pb2 as pb
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.fake_runner import tokens_alone
from pilotlight.tests.served import Served, details_of, ids_request, served
from pilotlight.tests.server.wire import (
    gained,
    ids_of,
    reason_of,
    refusal,
    say,
    submitted,
)

PROMPT = [1, 2, 3]


def _held() -> FakeEngine:
    return FakeEngine(is_held=True)


async def _started(s: Served, num_tokens: int, max_tokens: int = 8) -> Any:
    """A stream whose reader has `num_tokens`."""
    stream = aiter(s.stub.Generate(ids_request(PROMPT, max_tokens, request_id="a")))
    await submitted(s, "a")
    for _ in range(num_tokens):
        s.engine.link.step()
        await anext(stream)
    return stream


async def test_before_the_first_token_the_request_can_be_sent_again() -> None:
    async with served(_held()) as s:
        stream = await _started(s, 0)
        s.engine.link.end("killed by SIGKILL")
        error = await refusal(stream)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert reason_of(error) == "ENGINE_DIED"
    assert details_of(error)["ErrorInfo"].metadata["tokens_sent"] == "0"
    assert "killed by SIGKILL" in error.details()


async def test_after_the_first_token_the_stream_says_how_many_there_were() -> None:
    async with served(_held()) as s:
        stream = await _started(s, 3)
        s.engine.link.end("killed by SIGKILL")
        error = await refusal(stream)
    assert error.code() is grpc.StatusCode.ABORTED
    assert reason_of(error) == "ENGINE_DIED"
    assert details_of(error)["ErrorInfo"].metadata["tokens_sent"] == "3"


async def test_what_the_engine_said_last_is_still_delivered() -> None:
    async with served(_held()) as s:
        stream = await _started(s, 1, max_tokens=3)
        s.engine.link.step()
        s.engine.link.step()
        s.engine.link.end("exit code 1")
        rest = [chunk async for chunk in stream]
    assert ids_of(rest) == tokens_alone(PROMPT, 3, 200)[1:]
    assert rest[-1].finish_reason == pb.FINISH_REASON_LENGTH


async def test_a_unary_call_ends_with_the_status_too() -> None:
    async with served(_held()) as s:
        call = s.stub.Complete(ids_request(PROMPT, request_id="a"))
        await submitted(s, "a")
        s.engine.link.end("exit code 1")
        error = await refusal(call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_every_stream_is_told_and_nothing_of_them_is_left() -> None:
    async with served(_held()) as s:
        streams = [s.stub.Generate(ids_request(PROMPT, request_id=f"r{i}")) for i in range(10)]
        for i in range(10):
            await submitted(s, f"r{i}")
        s.engine.link.end("exit code 1")
        codes = [(await refusal(stream)).code() for stream in streams]
        await s.until(lambda: len(s.server.requests) == 0)
        load = await s.stub.GetLoad(pb.GetLoadRequest())
    assert codes == [grpc.StatusCode.UNAVAILABLE] * 10
    assert (load.num_admitted_requests, load.num_admitted_prompt_tokens) == (0, 0)


async def test_a_restarted_engine_serves_again_with_the_same_id() -> None:
    async with served(_held()) as s:
        stream = await _started(s, 2)
        s.engine.is_held = False
        s.engine.link.end("killed by SIGKILL")
        await refusal(stream)
        await s.until(lambda: len(s.engine.links) == 2)
        await s.wait_state(EngineState.READY)
        response = await s.stub.Complete(ids_request(PROMPT, request_id="a"))
        info = await s.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert list(response.completions[0].token_ids) == tokens_alone(PROMPT, 8, 200)
    assert info.num_engine_restarts == 1


async def test_until_it_is_back_requests_are_refused() -> None:
    async with served() as s:
        s.engine.boots = False
        s.engine.link.end("killed by SIGKILL")
        await s.until(lambda: len(s.engine.links) == 2)
        error = await refusal(s.stub.Complete(ids_request(PROMPT)))
        info = await s.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert reason_of(error) == "NOT_READY"
    assert "RetryInfo" in details_of(error)
    assert info.state == pb.SERVER_STATE_STARTING


async def test_with_exit_the_server_waits_for_nobody() -> None:
    async with served(_held(), on_engine_failure="exit") as s:
        stream = await _started(s, 1)
        s.engine.link.end("killed by SIGKILL")
        status = await s.server.engine.wait_ended()
        assert (await refusal(stream)).code() is grpc.StatusCode.ABORTED
    assert (status.state, status.reason) == (EngineState.FAILED, "killed by SIGKILL")
    assert not s.server.engine.failed_setup, "exit code 1: ours, not the operator's"
    assert len(s.engine.links) == 1


async def test_restarts_in_a_row_come_to_an_end() -> None:
    async with served(max_restarts=2) as s:
        for count in (1, 2, 3):
            await s.until(lambda count=count: len(s.engine.links) == count)
            s.engine.link.end("exit code 1")
        status = await s.server.engine.wait_ended()
    assert (status.state, status.num_restarts) == (EngineState.FAILED, 2)
    assert len(s.engine.links) == 3


async def test_a_mistake_in_the_setup_is_not_tried_again() -> None:
    async with served(FakeEngine(boots=False), is_ready=False) as s:
        await s.until(lambda: s.server.engine.status.phase == "check")
        s.engine.link.fail("config.json has no architectures", is_setup=True)
        status = await s.server.engine.wait_ended()
        info = await s.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert s.server.engine.failed_setup
    assert status.reason == "config.json has no architectures"
    assert (info.state, info.state_reason) == (pb.SERVER_STATE_FAILED, status.reason)
    assert len(s.engine.links) == 1


@pytest.mark.parametrize("num_tokens", [0, 2])
async def test_a_sequence_that_fails_is_internal_and_the_engine_goes_on(num_tokens: int) -> None:
    async with served(_held()) as s:
        stream = await _started(s, num_tokens)
        failed = gained("a", [], finish_reason=FinishReason.ERROR)
        failed.error = "the logits were not finite"
        say(s, failed)
        error = await refusal(stream)
        s.engine.link.core.abort(["a"])  # the engine itself would have ended it
        s.engine.link.release()
        assert await s.stub.Complete(ids_request(PROMPT))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert reason_of(error) == "ROW_FAILED"
    assert "not finite" in error.details()
