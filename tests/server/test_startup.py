"""A boot as clients see it: WatchStartup, facts in every state, and text that is late or broken."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from pilotlight.engine.messages import Progress
from pilotlight.engine.status import EngineState
from pilotlight.proto import inference_pb2 as pb
from pilotlight.server.config import DEMO_MODEL
from pilotlight.server.text import tokenizer
from pilotlight.server.text.tokenizer import Tokenizer, load_tokenizer
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.served import LIMIT_S, Served, ids_request, served
from pilotlight.tests.server.wire import http_get, read, refusal, text_engine

WATCH = pb.WatchStartupRequest()


async def _checking(s: Served) -> None:
    """The engine said its first word."""
    await s.until(lambda: s.server.engine.status.phase == "check")


# ---- WatchStartup ------------------------------------------------------------------------------


async def test_watch_startup_moves_with_the_boot_and_ends_at_ready() -> None:
    async with served(FakeEngine(boots=False), is_ready=False) as s:
        await _checking(s)
        watch = aiter(s.stub.WatchStartup(WATCH))
        first = await anext(watch)
        assert (first.state, first.phase) == (pb.SERVER_STATE_STARTING, "check")
        assert [phase.name for phase in first.phases] == ["start_process", "start_engine"]
        s.engine.link.say(Progress("load_weights", 0.0, 25, 100, "model.safetensors"))
        loading = await anext(watch)
        while loading.state == pb.SERVER_STATE_STARTING:
            loading = await anext(watch)
        assert (loading.state, loading.phase) == (pb.SERVER_STATE_LOADING, "load_weights")
        assert (loading.bytes_done, loading.bytes_total) == (25, 100)
        assert loading.detail == "model.safetensors"
        assert loading.eta_s > 0.0
        s.engine.link.become_ready()
        last = (await read(watch))[-1]
    assert last.state == pb.SERVER_STATE_READY
    # The tokenizer may be later than an engine that only plays one.
    assert "warm" in [phase.name for phase in last.phases[-2:]]


async def test_watch_startup_speaks_while_nothing_changes() -> None:
    async with served(FakeEngine(boots=False), is_ready=False) as s:
        await _checking(s)
        watch = aiter(s.stub.WatchStartup(WATCH))
        elapsed = [(await anext(watch)).elapsed_s for _ in range(3)]
    assert elapsed == sorted(set(elapsed)), "time passes"


async def test_watch_startup_of_a_ready_server_is_one_message() -> None:
    async with served() as s:
        [status] = await read(s.stub.WatchStartup(WATCH))
    assert (status.state, status.eta_s) == (pb.SERVER_STATE_READY, 0.0)


async def test_watch_startup_ends_with_the_reason_of_a_failure() -> None:
    async with served(FakeEngine(boots=False), is_ready=False) as s:
        await _checking(s)
        watch = aiter(s.stub.WatchStartup(WATCH))
        await anext(watch)
        s.engine.link.fail("config.json: no architectures", is_setup=True)
        last = (await read(watch))[-1]
    assert last.state == pb.SERVER_STATE_FAILED
    assert last.detail == "config.json: no architectures"


async def test_a_watcher_who_leaves_leaves_nothing_behind() -> None:
    async with served(FakeEngine(boots=False), is_ready=False) as s:
        await _checking(s)
        await s.stub.GetLoad(pb.GetLoadRequest())  # the channel is up
        num_tasks = len(asyncio.all_tasks())
        call = s.stub.WatchStartup(WATCH)
        await anext(aiter(call))
        assert len(asyncio.all_tasks()) > num_tasks
        call.cancel()
        await s.until(lambda: len(asyncio.all_tasks()) <= num_tasks)


# ---- facts in every state ----------------------------------------------------------------------


async def _loading(s: Served) -> None:
    await _checking(s)
    s.engine.link.say(Progress("load_weights", 0.0, 1, 2))
    await s.wait_state(EngineState.LOADING)


async def _warming(s: Served) -> None:
    await _checking(s)
    s.engine.link.say(Progress("warm", 0.0))
    await s.wait_state(EngineState.WARMING)


async def _ready(s: Served) -> None:
    await _checking(s)
    s.engine.link.become_ready()
    await s.wait_state(EngineState.READY)
    await s.until(lambda: s.server.text.is_loaded)


async def _draining(s: Served) -> None:
    await _ready(s)
    await s.server.drain()


async def _failed(s: Served) -> None:
    await _checking(s)
    s.engine.link.fail("broken", is_setup=True)
    await s.wait_state(EngineState.FAILED)


STATES: dict[str, Callable[[Served], Awaitable[None]]] = {
    "STARTING": _checking,
    "LOADING": _loading,
    "WARMING": _warming,
    "READY": _ready,
    "DRAINING": _draining,
    "FAILED": _failed,
}


@pytest.mark.parametrize("state", STATES)
async def test_facts_can_be_asked_for_in_every_state(state: str) -> None:
    async with served(FakeEngine(boots=False), is_ready=False) as s:
        await STATES[state](s)
        server = await s.stub.GetServerInfo(pb.GetServerInfoRequest())
        model = await s.stub.GetModelInfo(pb.GetModelInfoRequest())
        load = await s.stub.GetLoad(pb.GetLoadRequest())
        timeline = await http_get(s, "/startup")
    assert server.state == pb.ServerState.Value(f"SERVER_STATE_{state}")
    assert server.uptime_s > 0.0
    assert model.name == "model", "the name of the demo model's folder"
    assert load.max_admitted_requests == 4 * 64
    assert timeline[0] == 200
    assert f'"state": "{state}"' in timeline[1]
    knows_the_model = state in ("READY", "DRAINING")
    assert (model.context_len == 256) == knows_the_model
    assert (server.num_blocks == 256) == knows_the_model


async def test_a_ready_server_tells_what_runs() -> None:
    async with served(text_engine(eos_token_ids=(2,)), max_num_seqs=8, max_batched_tokens=64) as s:
        server = await s.stub.GetServerInfo(pb.GetServerInfoRequest())
        model = await s.stub.GetModelInfo(pb.GetModelInfoRequest())
    facts = s.engine.facts
    assert model == pb.GetModelInfoResponse(
        name="model",
        architecture=facts.architecture,
        context_len=facts.context_len,
        vocab_size=facts.vocab_size,
        num_parameters=facts.num_parameters,
        weight_bytes=facts.weight_bytes,
        dtype=facts.dtype,
        kv_cache_dtype=facts.kv_cache_dtype,
        eos_token_ids=[2],
        has_chat_template=True,
    )
    assert dict(server.kernels) == facts.kernels
    assert (server.device, server.kv_cache_bytes) == (facts.device, facts.kv_cache_bytes)
    assert (server.max_num_seqs, server.max_batched_tokens) == (8, 64)
    assert server.version


async def test_load_follows_the_engine_and_the_door() -> None:
    async with served(FakeEngine(is_held=True, num_blocks=64), max_queued_tokens=100) as s:
        call = s.stub.Generate(ids_request(list(range(7)), request_id="a"))
        await s.until(lambda: len(s.engine.link.received) == 2)
        before = await s.stub.GetLoad(pb.GetLoadRequest())
        s.engine.link.step()
        s.engine.link.beat()
        await s.until(lambda: s.server.engine.status.statistics.num_running == 1)
        after = await s.stub.GetLoad(pb.GetLoadRequest())
        call.cancel()
    assert (before.num_admitted_requests, before.num_admitted_prompt_tokens) == (1, 7)
    assert before.max_admitted_prompt_tokens == 100
    assert (after.num_running, after.num_waiting) == (1, 0)
    assert after.kv_cache_use == 2 / 64


# ---- text that is late or broken ---------------------------------------------------------------


async def test_a_server_whose_tokenizer_is_late_is_not_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_load = threading.Event()

    def late(folder: Path) -> Tokenizer | None:
        assert may_load.wait(LIMIT_S)
        return load_tokenizer(folder)

    monkeypatch.setattr(tokenizer, "load_tokenizer", late)
    async with served(text_engine(), is_ready=False) as s:
        await s.wait_state(EngineState.READY)
        try:
            assert (await http_get(s, "/readyz"))[0] == 503
            watch = aiter(s.stub.WatchStartup(WATCH))
            assert (await anext(watch)).state == pb.SERVER_STATE_WARMING
            error = await refusal(s.stub.Complete(ids_request([1, 2, 3])))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
        finally:
            may_load.set()
        assert (await read(watch))[-1].state == pb.SERVER_STATE_READY
        assert (await http_get(s, "/readyz"))[0] == 200
        status = s.server.engine.status
        assert status.phases[-1].name == "read_text"
        assert s.server.lifecycle.ready_after_s == status.boot_s
        assert status.attributed > 0.999
        assert await s.stub.Complete(ids_request([1, 2, 3]))


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", "{}"), ("chat_template.jinja", "{% for %}")]
)
@pytest.mark.parametrize("num_deaths", [0, 1])
async def test_text_that_cannot_be_read_is_the_operators_mistake(
    name: str, content: str, num_deaths: int, tmp_path: Path
) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((DEMO_MODEL / file).read_bytes())
    (tmp_path / name).write_text(content)
    engine = FakeEngine(boots=False)
    async with served(engine, is_ready=False, model=str(tmp_path)) as s:
        await s.until(lambda: bool(engine.links))
        for _ in range(num_deaths):
            engine.link.end("exit code 1")
        status = await s.server.engine.wait_ended()
    assert status.state is EngineState.FAILED
    assert str(tmp_path) in status.reason
    assert s.server.engine.failed_setup, "exit code 2, and no restart"
