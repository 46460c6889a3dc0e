"""Whoever gives a request up, however and in whatever state, its blocks are free at once.

Every state is reached step by step on a held engine; the ends are a cancelled call, a deadline, a
client that is gone, and Abort.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import pytest
from pilotlight.engine.messages import Abort, Submit
from pilotlight.proto import inference_pb2 as pb
from pilotlight.proto import inference_pb2_grpc as pb_grpc
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.served import Served, details_of, ids_request, served
from pilotlight.tests.server.wire import SlowTokenizer, read, refusal, submitted, text_request

TARGET, OTHER = "target", "other"
MAX_STEPS_TO_FREE = 2
DEADLINES_S = (0.3, 3.0, 30.0)
"""Tried in turn, on a new server each, until the state was reached before the deadline."""


class Scene:
    """A server with a held engine, a client of its own for the target, and the target's call."""

    def __init__(self, s: Served, channel: grpc.aio.Channel) -> None:
        self.s = s
        self.channel = channel
        self.tokenizer = SlowTokenizer()
        self.stream: Any = None
        self.first_chunk: pb.GenerateChunk | None = None
        self.other: Any = None
        s.server.text.tokenizer = self.tokenizer  # type: ignore[assignment]

    @property
    def core(self) -> Any:
        return self.s.engine.link.core

    @property
    def was_submitted(self) -> bool:
        received = self.s.engine.link.received
        return any(isinstance(m, Submit) and m.request_id == TARGET for m in received)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.s.engine.link.step()


@asynccontextmanager
async def _scene(**sizes: Any) -> AsyncIterator[Scene]:
    async with served(FakeEngine(is_held=True, **sizes)) as s:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{s.server.port}") as channel:
            scene = Scene(s, channel)
            try:
                yield scene
            finally:
                scene.tokenizer.may_go_on.set()


# ---- states ------------------------------------------------------------------------------------


def _prompt(first: int, length: int = 12) -> list[int]:
    return list(range(first, first + length))


async def _queued(scene: Scene) -> None:
    await submitted(scene.s, TARGET)
    scene.steps(1)
    statistics = scene.core.statistics()
    assert (statistics.num_running, statistics.num_waiting) == (1, 1)


async def _tokenising(scene: Scene) -> None:
    await scene.s.until(scene.tokenizer.is_entered.is_set)
    assert not scene.was_submitted


async def _prefilling(scene: Scene) -> None:
    await submitted(scene.s, TARGET)
    record = scene.s.engine.link.step()
    assert record is not None
    assert (record.num_tokens, record.outputs) == (16, []), "a chunk of the prompt, no token yet"
    assert scene.core.statistics().num_used_blocks > 0


async def _decoding(scene: Scene) -> None:
    await submitted(scene.s, TARGET)
    scene.steps(3)
    scene.first_chunk = await anext(aiter(scene.stream))
    assert scene.core.statistics().num_used_blocks > 0


async def _preempted(scene: Scene) -> None:
    await submitted(scene.s, TARGET)
    while not scene.core.statistics().num_preemptions:
        assert scene.s.engine.link.step(), "the pool was never too small"
    statistics = scene.core.statistics()
    assert (statistics.num_running, statistics.num_waiting) == (1, 1)


@dataclass
class State:
    """How a request gets there: sizes of the engine, the request, the steps."""

    reach: Callable[[Scene], Awaitable[None]]
    request: pb.GenerateRequest = field(default_factory=lambda: ids_request(_prompt(0), 12))
    sizes: dict[str, Any] = field(default_factory=dict)
    has_other: bool = False
    """One that came before: the target waits behind it, or loses its blocks to it."""


STATES = {
    "queued": State(_queued, sizes={"max_num_seqs": 1}, has_other=True),
    "tokenising": State(_tokenising, request=text_request("some text")),
    "prefilling": State(
        _prefilling, request=ids_request(_prompt(0, 40)), sizes={"max_batched_tokens": 16}
    ),
    "decoding": State(_decoding),
    "preempted": State(_preempted, sizes={"num_blocks": 8, "context_len": 32}, has_other=True),
}


async def _reach(scene: Scene, state: State, timeout_s: float | None) -> bool:
    """False when the deadline passed on the way."""
    if state.has_other:
        scene.other = scene.s.stub.Generate(ids_request(_prompt(100), 20, request_id=OTHER))
        await submitted(scene.s, OTHER)
    request = pb.GenerateRequest(request_id=TARGET)
    request.MergeFrom(state.request)
    scene.stream = pb_grpc.InferenceStub(scene.channel).Generate(request, timeout=timeout_s)
    reaching = asyncio.ensure_future(state.reach(scene))
    ending = asyncio.ensure_future(scene.stream.code())
    await asyncio.wait({reaching, ending}, return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    if not reaching.done():
        reaching.cancel()
        return False
    await reaching
    return True


# ---- ends --------------------------------------------------------------------------------------


async def _cancel(scene: Scene) -> None:
    scene.stream.cancel()
    assert await scene.stream.code() is grpc.StatusCode.CANCELLED


async def _disconnect(scene: Scene) -> None:
    await scene.channel.close()


async def _deadline(scene: Scene) -> None:
    assert await scene.stream.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def _abort(scene: Scene) -> None:
    response = await scene.s.stub.Abort(pb.AbortRequest(request_ids=[TARGET, "nobody"]))
    assert [(r.request_id, r.found) for r in response.results] == [
        (TARGET, True),
        ("nobody", False),
    ]


ENDS = {"cancel": _cancel, "disconnect": _disconnect, "deadline": _deadline, "abort": _abort}


# ---- all of them -------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("state", STATES)
async def test_the_blocks_are_free_within_two_steps(state: str, end: str) -> None:
    deadlines = DEADLINES_S if end == "deadline" else (None,)
    for timeout_s in deadlines:
        async with _scene(**STATES[state].sizes) as scene:
            if await _reach(scene, STATES[state], timeout_s):
                await ENDS[end](scene)
                await _assert_freed(scene)
                if end == "abort":
                    await _assert_told(scene)
                return await _assert_serves(scene)
    raise AssertionError("this machine is too slow for any of the deadlines")


async def _assert_freed(scene: Scene) -> None:
    """The engine hears of it without a step, and needs at most two to be rid of it."""
    if scene.was_submitted:
        received = scene.s.engine.link.received
        await scene.s.until(lambda: Abort([TARGET]) in received)
    scene.steps(MAX_STEPS_TO_FREE)
    assert TARGET not in scene.core.live_request_ids()
    scene.core.check_integrity()
    if scene.other is None:
        assert scene.core.statistics().num_used_blocks == 0
    else:
        scene.other.cancel()
        await scene.s.until(lambda: Abort([OTHER]) in scene.s.engine.link.received)
        scene.steps(MAX_STEPS_TO_FREE)
    statistics = scene.core.statistics()
    assert statistics.num_used_blocks == statistics.num_running == statistics.num_waiting == 0
    assert not scene.core.has_work


async def _assert_told(scene: Scene) -> None:
    """An aborted stream ends well, and says how."""
    last = (await read(scene.stream))[-1]
    assert last.finish_reason == pb.FINISH_REASON_ABORTED
    assert last.HasField("usage")
    assert last.usage.output_tokens == last.num_output_tokens


async def _assert_serves(scene: Scene) -> None:
    """Nothing is left in the front either, and the next request succeeds under the same id."""
    s = scene.s
    await s.until(lambda: len(s.server.requests) == 0)
    load = await s.stub.GetLoad(pb.GetLoadRequest())
    assert (load.num_admitted_requests, load.num_admitted_prompt_tokens) == (0, 0)
    assert s.server.engine.num_live_requests == 0
    was_submitted = scene.was_submitted
    scene.tokenizer.may_go_on.set()
    s.engine.link.release()
    await s.stub.Complete(ids_request([1, 2, 3], 2))
    assert scene.was_submitted == was_submitted, "text that came late is not for the engine"
    await s.stub.Complete(ids_request([1, 2, 3], 2, request_id=TARGET))


# ---- more ways ---------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["cancel", "disconnect", "abort"])
async def test_a_unary_call_is_given_up_as_well(end: str) -> None:
    async with _scene() as scene:
        request = ids_request(_prompt(0), 12, request_id=TARGET)
        scene.stream = pb_grpc.InferenceStub(scene.channel).Complete(request)
        await submitted(scene.s, TARGET)
        scene.steps(3)
        assert scene.core.statistics().num_used_blocks > 0
        await ENDS[end](scene)
        await _assert_freed(scene)
        if end == "abort":
            [completion] = (await scene.stream).completions
            assert completion.finish_reason == pb.FINISH_REASON_ABORTED
            assert len(completion.token_ids) == 3
        await _assert_serves(scene)


async def test_a_client_that_does_not_read_can_go_as_well() -> None:
    """The handler then waits in a write and not for the engine."""
    tiny_window = (("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0))
    async with served(FakeEngine(context_len=512, is_held=True)) as s:
        link, target = s.engine.link, f"127.0.0.1:{s.server.port}"
        async with grpc.aio.insecure_channel(target, options=tiny_window) as channel:
            stub = pb_grpc.InferenceStub(channel)
            call = stub.Generate(ids_request([1, 2, 3], 500, request_id=TARGET))
            await submitted(s, TARGET)
            for _ in range(400):
                link.step()
                await asyncio.sleep(0)
            call.cancel()
            await s.until(lambda: Abort([TARGET]) in link.received)
        assert link.core.statistics().num_used_blocks == 0
        await s.until(lambda: len(s.server.requests) == 0)


async def test_all_samples_are_given_up() -> None:
    request = ids_request(_prompt(0), 12, request_id=TARGET)
    request.sampling.n = 4
    async with _scene() as scene:
        scene.stream = pb_grpc.InferenceStub(scene.channel).Generate(request)
        await submitted(scene.s, TARGET)
        scene.steps(3)
        assert scene.core.statistics().num_running == 4
        await _cancel(scene)
        await _assert_freed(scene)


@pytest.mark.parametrize(("count", "size"), [(0, "0 ids"), (1025, "1025 ids")])
async def test_abort_takes_a_bounded_number_of_ids(count: int, size: str) -> None:
    async with served() as s:
        error = await refusal(s.stub.Abort(pb.AbortRequest(request_ids=["a"] * count)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details_of(error)["ErrorInfo"].metadata["field"] == "request_ids"
    assert size in error.details()


async def test_abort_is_idempotent() -> None:
    async with served(FakeEngine(is_held=True)) as s:
        call = s.stub.Generate(ids_request([1, 2, 3], request_id=TARGET))
        await submitted(s, TARGET)
        ask = pb.AbortRequest(request_ids=[TARGET])
        assert (await s.stub.Abort(ask)).results[0].found
        s.engine.link.step()
        assert (await read(call))[-1].finish_reason == pb.FINISH_REASON_ABORTED
        await s.until(lambda: len(s.server.requests) == 0)
        assert not (await s.stub.Abort(ask)).results[0].found
