"""The admin port over real gRPC, with a fake engine: models come and go behind one data port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pilotlight import cli
from pilotlight.engine.config import EngineConfig
from pilotlight.engine.errors import PortInUse
from pilotlight.engine.messages import Boot, FinishReason, Unload
from pilotlight.engine.status import EngineState
from pilotlight.proto import admin_pb2 as admin
from pilotlight.proto import admin_pb2_grpc as admin_grpc
from pilotlight.proto import inference_pb2 as pb
from pilotlight.server.config import DEMO_MODEL, ServeConfig
from pilotlight.server.main import Server
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.fake_runner import tokens_alone
from pilotlight.tests.served import DEFAULTS, LIMIT_S, Served, details_of, ids_request, served
from pilotlight.tests.server.wire import (
    VOCAB_SIZE,
    SlowTokenizer,
    http_get,
    ids_of,
    read,
    reason_of,
    refusal,
    submitted,
    text_engine,
    text_request,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
STANDBY, SLEEPING = pb.SERVER_STATE_STANDBY, pb.SERVER_STATE_SLEEPING
READY = pb.SERVER_STATE_READY
LOAD, UNLOAD = admin.LoadModelRequest(), admin.UnloadModelRequest()
SLEEP, WAKE = admin.SleepRequest(), admin.WakeRequest()
EXPECTED = tokens_alone([1, 2, 3], 8, VOCAB_SIZE)


class Operated:
    """A served server, and stubs for its admin port."""

    def __init__(self, served: Served, channel: grpc.aio.Channel) -> None:
        self.served = served
        self.stub = served.stub
        self.channel = channel
        self.admin = admin_grpc.AdminStub(channel)
        self.engine = served.engine

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.served.server.admin_port}"

    async def token_ids(self) -> list[int]:
        return ids_of(await read(self.stub.Generate(ids_request([1, 2, 3]))))

    async def metrics(self) -> str:
        return (await http_get(self.served, "/metrics"))[1]


@asynccontextmanager
async def operated(
    engine: FakeEngine | None = None, standby: bool = True, **options: Any
) -> AsyncIterator[Operated]:
    """On standby, or READY with the demo's text."""
    engine = engine or text_engine(clock=time.monotonic)
    async with served(engine, not standby, standby=standby, admin_port=0, **options) as s:
        if standby:
            await s.wait_state(EngineState.STANDBY)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{s.server.admin_port}") as channel:
            yield Operated(s, channel)


async def _health(s: Served, service: str) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    status: int = (await health_pb2_grpc.HealthStub(s.channel).Check(request)).status
    return status


async def _begun(o: Operated, call: Any) -> asyncio.Future[admin.AdminResponse]:
    """An order under way: the engine has heard of it."""
    num_heard = len(o.engine.link.received)
    future = asyncio.ensure_future(_awaited(call))
    await o.served.until(lambda: len(o.engine.link.received) > num_heard)
    return future


async def _awaited(call: Any) -> admin.AdminResponse:
    response: admin.AdminResponse = await call
    return response


# ---- standby -----------------------------------------------------------------------------------


async def test_on_standby_every_face_says_so() -> None:
    async with operated() as o:
        s = o.served
        assert await _health(s, "liveness") == SERVING
        assert await _health(s, "readiness") == NOT_SERVING
        assert (await http_get(s, "/readyz")) == (503, '{"ready": false, "state": "STANDBY"}\n')
        assert '"state": "STANDBY"' in (await http_get(s, "/startup"))[1]
        info = await o.stub.GetServerInfo(pb.GetServerInfoRequest())
        model = await o.stub.GetModelInfo(pb.GetModelInfoRequest())
        metrics = await o.metrics()
    assert info.state == STANDBY
    assert model == pb.GetModelInfoResponse()
    assert "pilotlight_ready 0.0" in metrics
    assert "pilotlight_standby 1.0" in metrics
    assert "pilotlight_model_info{" not in metrics


async def test_on_standby_requests_are_told_what_is_missing() -> None:
    async with operated() as o:
        error = await refusal(o.stub.Complete(ids_request([1, 2, 3])))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(error) == "NOT_READY"
        assert "STANDBY; no model is loaded, and Admin.LoadModel loads one" in error.details()
        error = await refusal(o.stub.Tokenize(pb.TokenizeRequest(text="a")))
        assert (error.code(), error.details()) == (
            grpc.StatusCode.UNAVAILABLE,
            "no model is loaded",
        )


async def test_watch_startup_waits_on_standby_and_sees_the_load() -> None:
    async with operated() as o:
        watch = aiter(o.stub.WatchStartup(pb.WatchStartupRequest()))
        assert (await anext(watch)).state == STANDBY
        o.engine.boots = False
        load = await _begun(o, o.admin.LoadModel(LOAD))
        seen = await anext(watch)
        while seen.state == STANDBY:
            seen = await anext(watch)
        assert seen.state == pb.SERVER_STATE_LOADING
        assert 0.0 <= seen.since_ask_s < seen.elapsed_s
        o.engine.link.become_ready()
        await load
        last = (await read(watch))[-1]
    assert last.state == READY
    assert last.phases[0].name == "accept"


# ---- loading -----------------------------------------------------------------------------------


def _reads_text() -> bool:
    return any(task.get_coro().__qualname__ == "_read" for task in asyncio.all_tasks())


async def test_text_that_was_there_before_the_engine_adds_nothing_to_the_load() -> None:
    async with operated() as o:
        o.engine.boots = False
        load = await _begun(o, o.admin.LoadModel(LOAD))
        await o.served.until(lambda: not _reads_text())
        o.engine.link.become_ready()
        response = await load
        assert sum(p.duration_s for p in response.phases) == pytest.approx(response.ready_s, 1e-9)


async def test_a_load_makes_a_server_that_serves() -> None:
    async with operated() as o:
        response = await o.admin.LoadModel(LOAD)
        assert response.state == READY
        # The tokenizer may be later than an engine that only plays one.
        names = [phase.name for phase in response.phases if phase.name != "read_text"]
        assert names == ["accept", "check", "import_torch", "load_weights", "warm"]
        assert 0.0 < sum(p.duration_s for p in response.phases) <= response.ready_s + 1e-9
        assert await o.token_ids() == EXPECTED
        assert await _health(o.served, "readiness") == SERVING
        model = await o.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (model.name, model.has_chat_template) == ("model", True)
        metrics = await o.metrics()
    assert "pilotlight_ready 1.0" in metrics
    assert "pilotlight_standby 0.0" in metrics
    assert 'pilotlight_startup_phase_seconds{phase="accept"}' in metrics
    assert 'name="model"' in metrics
    assert "pilotlight_startup_ready_seconds 0.0\n" not in metrics


async def test_a_load_has_options_of_its_own() -> None:
    request = admin.LoadModelRequest(
        model=str(DEMO_MODEL),
        model_name="pilot",
        max_model_len=64,
        dtype="float32",
        kv_cache_bytes=1 << 20,
    )
    async with operated(block_size=8, max_model_len=32) as o:
        await o.admin.LoadModel(request)
        [*_, boot] = o.engine.link.received
        assert isinstance(boot, Boot)
        assert boot.config == EngineConfig(
            model=str(DEMO_MODEL),
            max_model_len=64,
            dtype="float32",
            kv_cache_bytes=1 << 20,
            block_size=8,
        )
        assert (await o.stub.Complete(ids_request([1, 2, 3], model="pilot"))).usage.output_tokens
        error = await refusal(o.stub.Complete(ids_request([1, 2, 3], model="model")))
        assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_an_option_that_makes_no_sense_changes_nothing() -> None:
    async with operated() as o:
        error = await refusal(o.admin.LoadModel(admin.LoadModelRequest(dtype="int3")))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "--dtype is 'int3'" in error.details()
        assert len(o.engine.link.received) == 1
        assert (await o.admin.LoadModel(LOAD)).state == READY


async def test_a_model_that_the_engine_refuses_is_the_callers_to_mend() -> None:
    async with operated() as o:
        o.engine.boots = False
        load = await _begun(o, o.admin.LoadModel(admin.LoadModelRequest(model="/nowhere")))
        o.engine.link.stand_by("/nowhere is not a folder")
        error = await refusal(load)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert reason_of(error) == "CANNOT_LOAD"
        assert error.details() == "/nowhere is not a folder"
        info = await o.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert (info.state, info.state_reason) == (STANDBY, "/nowhere is not a folder")
        o.engine.boots = True
        assert (await o.admin.LoadModel(LOAD)).state == READY
        assert await o.token_ids() == EXPECTED


async def test_a_broken_tokenizer_is_refused_and_its_weights_are_unloaded(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    async with operated() as o:
        request = admin.LoadModelRequest(model=str(tmp_path))
        error = await refusal(o.admin.LoadModel(request))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "tokenizer.json" in error.details()
        assert o.engine.link.received[-1] == Unload()
        model = await o.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert model.name == ""
        assert (await o.admin.LoadModel(LOAD)).state == READY
        assert await o.token_ids() == EXPECTED


async def test_an_engine_that_dies_of_a_model_is_replaced_and_takes_another() -> None:
    async with operated() as o:
        o.engine.boots = False
        load = await _begun(o, o.admin.LoadModel(LOAD))
        o.engine.boots = True
        o.engine.link.end("killed by SIGKILL")
        error = await refusal(load)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "SIGKILL" in error.details()
        assert (await o.admin.LoadModel(LOAD)).state == READY, "on standby when it was answered"


# ---- unloading, sleeping, waking ---------------------------------------------------------------


async def test_sleep_ends_streams_as_aborted_and_wake_brings_the_same_tokens() -> None:
    async with operated(text_engine(clock=time.monotonic, is_held=True), standby=False) as o:
        stream = aiter(o.stub.Generate(ids_request([1, 2, 3], 100, request_id="a")))
        await submitted(o.served, "a")
        o.engine.link.step()
        await anext(stream)
        response = await o.admin.Sleep(SLEEP)
        assert (response.state, response.ready_s) == (SLEEPING, 0.0)
        assert (await read(stream))[-1].finish_reason == FinishReason.ABORTED
        error = await refusal(o.stub.Complete(ids_request([1, 2, 3])))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "SLEEPING; it sleeps, and Admin.Wake wakes it" in error.details()
        assert await _health(o.served, "readiness") == NOT_SERVING
        assert await o.stub.Tokenize(pb.TokenizeRequest(text="a")), "text needs no engine"
        o.engine.link.release()
        assert (await o.admin.Wake(WAKE)).state == READY
        assert await o.token_ids() == EXPECTED


async def test_another_model_takes_the_name_and_the_place_of_the_first() -> None:
    async with operated(standby=False, model_name="first") as o:
        assert (await o.admin.UnloadModel(UNLOAD)).state == STANDBY
        await o.admin.LoadModel(admin.LoadModelRequest(model_name="second"))
        assert (await o.stub.GetModelInfo(pb.GetModelInfoRequest())).name == "second"
        assert 'name="second"' in await o.metrics()
        error = await refusal(o.stub.Complete(ids_request([1], model="first")))
        assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_what_is_done_already_is_answered() -> None:
    async with operated(standby=False) as o:
        assert (await o.admin.Wake(WAKE)).state == READY
        assert (await o.admin.Sleep(SLEEP)).state == SLEEPING
        assert (await o.admin.Sleep(SLEEP)).state == SLEEPING
        assert (await o.admin.UnloadModel(UNLOAD)).state == STANDBY
        assert (await o.admin.UnloadModel(UNLOAD)).state == STANDBY


async def test_a_prompt_that_was_tokenised_for_a_model_that_left_is_refused() -> None:
    async with operated() as o:
        await o.admin.LoadModel(LOAD)
        slow = SlowTokenizer()
        o.served.server.text.tokenizer = slow  # type: ignore[assignment]
        call = o.stub.Complete(text_request("some text"))
        try:
            await o.served.until(slow.is_entered.is_set)
            await o.admin.UnloadModel(UNLOAD)
            await o.admin.LoadModel(LOAD)
        finally:
            slow.may_go_on.set()
        error = await refusal(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "the model was unloaded" in error.details()


# ---- what is not allowed -----------------------------------------------------------------------


ORDERS: dict[str, Callable[[Operated], Any]] = {
    "LoadModel": lambda o: o.admin.LoadModel(LOAD),
    "UnloadModel": lambda o: o.admin.UnloadModel(UNLOAD),
    "Sleep": lambda o: o.admin.Sleep(SLEEP),
    "Wake": lambda o: o.admin.Wake(WAKE),
}


async def _wrong_state(o: Operated, order: str, state: str, allowed: str) -> None:
    error = await refusal(ORDERS[order](o))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert f"{order} is not possible in state {state}" in error.details()
    info = details_of(error)["ErrorInfo"]
    assert info.reason == "WRONG_STATE"
    assert dict(info.metadata) == {"state": state, "allowed": allowed}


async def test_a_state_says_what_it_allows() -> None:
    async with operated() as o:
        for order in ("Sleep", "Wake"):
            await _wrong_state(o, order, "STANDBY", "LoadModel,UnloadModel")
        await o.admin.LoadModel(LOAD)
        await _wrong_state(o, "LoadModel", "READY", "UnloadModel,Sleep,Wake")
        await o.admin.Sleep(SLEEP)
        await _wrong_state(o, "LoadModel", "SLEEPING", "UnloadModel,Sleep,Wake")


@pytest.mark.parametrize("order", ORDERS)
async def test_one_order_at_a_time(order: str) -> None:
    async with operated() as o:
        o.engine.boots = False
        load = await _begun(o, o.admin.LoadModel(LOAD))
        await _wrong_state(o, order, "LOADING", "")
        o.engine.link.become_ready()
        assert (await load).state == READY


@pytest.mark.parametrize("order", ORDERS)
async def test_a_server_that_drains_takes_no_orders(order: str) -> None:
    async with operated(standby=False) as o:
        await o.served.server.drain()
        await _wrong_state(o, order, "DRAINING", "")


@pytest.mark.parametrize("order", ORDERS)
async def test_a_first_boot_takes_no_orders(order: str) -> None:
    async with served(FakeEngine(boots=False), False, admin_port=0) as s:
        target = f"127.0.0.1:{s.server.admin_port}"
        await s.until(lambda: s.server.engine.status.phase == "check")
        async with grpc.aio.insecure_channel(target) as channel:
            await _wrong_state(Operated(s, channel), order, "STARTING", "")


async def test_a_caller_who_leaves_does_not_stop_a_load() -> None:
    async with operated() as o:
        o.engine.boots = False
        call = o.admin.LoadModel(LOAD)
        load = await _begun(o, call)
        call.cancel()
        await asyncio.wait({load})
        o.engine.boots = True
        o.engine.link.become_ready()
        await o.served.until(lambda: o.served.server.lifecycle.is_ready)
        assert await o.token_ids() == EXPECTED
        assert (await o.admin.Sleep(SLEEP)).state == SLEEPING, "the next order is taken"


async def test_a_server_that_stops_answers_the_order_that_waits() -> None:
    async with operated() as o:
        o.engine.boots = False
        load = await _begun(o, o.admin.LoadModel(LOAD))
        await o.served.server.engine.stop()
        assert (await refusal(load)).code() is grpc.StatusCode.UNAVAILABLE


# ---- the port ----------------------------------------------------------------------------------


async def _services(channel: grpc.aio.Channel) -> set[str]:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    [response] = await read(stub.ServerReflectionInfo(iter([request])))
    return {service.name for service in response.list_services_response.service}


async def test_the_admin_port_is_one_of_its_own() -> None:
    async with operated() as o:
        assert "pilotlight.v1.Admin" in await _services(o.channel)
        assert "pilotlight.v1.Inference" not in await _services(o.channel)
        assert "pilotlight.v1.Admin" not in await _services(o.served.channel)
        error = await refusal(admin_grpc.AdminStub(o.served.channel).Wake(WAKE))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_admin_port_is_bound_to_loopback_whatever_the_data_port_is() -> None:
    async with operated(host="0.0.0.0") as o:
        number = o.served.server.admin_port
        addresses = _listening_on(number)
    # IPv4, or IPv4 in a socket of IPv6.
    assert addresses in ({"0100007F"}, {"0000000000000000FFFF00000100007F"})


def _listening_on(number: int) -> set[str]:
    """Local addresses of listening sockets with this port, as the kernel writes them."""
    files = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    lines = [line.split() for file in files for line in file.read_text().splitlines()]
    found = [line[1].split(":") for line in lines if line[3] == "0A"]
    return {address for address, port in found if int(port, 16) == number}


async def test_there_is_no_admin_port_unless_asked_for() -> None:
    async with served() as s:
        assert s.server.admin_port == -1


async def test_an_admin_port_in_use_is_named() -> None:
    async with operated() as o:
        config = ServeConfig(**{**DEFAULTS, "admin_port": o.served.server.admin_port})
        with pytest.raises(PortInUse, match="--admin-port"):
            Server(config, time.monotonic(), o.engine.launch)


# ---- the command -------------------------------------------------------------------------------


async def _admin_command(o: Operated, *arguments: str) -> int:
    async with asyncio.timeout(LIMIT_S):
        return await asyncio.to_thread(cli.main, ["admin", *arguments, "--target", o.target])


async def test_the_command_gives_orders_and_tells_what_came_of_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with operated() as o:
        assert await _admin_command(o, "load", str(DEMO_MODEL), "--kv-cache-bytes", "1MiB") == 0
        assert "READY" in capsys.readouterr().out
        assert await _admin_command(o, "sleep", "--json") == 0
        assert '"state": "SLEEPING"' in capsys.readouterr().out
        assert await _admin_command(o, "wake") == 0
        assert await _admin_command(o, "load") == 1
        assert "FAILED_PRECONDITION: LoadModel" in capsys.readouterr().err
        assert await _admin_command(o, "unload") == 0
        boots = [m.config for m in o.engine.link.received if isinstance(m, Boot)]
    assert [config.kv_cache_bytes for config in boots] == [0, 1 << 20, 1 << 20]


@pytest.mark.parametrize("order", ["unload", "sleep", "wake"])
def test_only_load_takes_a_model(order: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["admin", order, "/m", "--target", "127.0.0.1:1"]) == 2
    assert f"{order} takes no model" in capsys.readouterr().err


def test_the_commands_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["admin", "--help"])
    text = capsys.readouterr().out
    for words in ("STANDBY -> READY", "pilotlight serve --standby --admin-port", "Exit codes"):
        assert words in text
