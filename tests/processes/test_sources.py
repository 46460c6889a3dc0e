"""A server whose MODEL is elsewhere: fetched once, then from the cache; over real HTTP and S3."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from pilotlight.proto import admin_pb2 as admin
from pilotlight.proto import admin_pb2_grpc as admin_grpc
from pilotlight.proto import inference_pb2 as pb
from pilotlight.server.config import DEMO_MODEL
from pilotlight.tests.processes.server_process import LIMIT_S, ServerProcess, server_process
from pilotlight.tests.weights_cache.servers import cutting, nginx


def _tokens(server: ServerProcess) -> list[int]:
    return [i for chunk in server.stream(6) for i in chunk.token_ids]


def _boot(server: ServerProcess) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.ops}/startup", timeout=20) as response:
        boot: dict[str, Any] = json.load(response)
    return boot


def _phases(server: ServerProcess) -> list[str]:
    return [phase["name"] for phase in _boot(server)["phases"]]


@pytest.fixture(scope="module")
def wanted() -> list[int]:
    with server_process() as server:
        return _tokens(server)


@contextmanager
def _from(url: str, cache: Path, *flags: str) -> Iterator[ServerProcess]:
    with server_process(url, "--cache", str(cache), *flags) as server:
        yield server


def test_a_model_behind_a_url_is_fetched_once(tmp_path: Path, wanted: list[int]) -> None:
    with nginx(DEMO_MODEL, tmp_path / "nginx") as web, cutting(web.port) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/"
        proxy.cut_after(1 << 20, 2 << 20)
        with _from(url, tmp_path / "cache") as first:
            assert _tokens(first) == wanted
            boot = _boot(first)
            assert boot["attributed"] > 0.98
            assert "fetch" in _phases(first)
            answer = first.stub.Tokenize(pb.TokenizeRequest(text="def f"), timeout=LIMIT_S)
            assert answer.token_ids, "the front reads the tokenizer where the engine has put it"
            first.wait_log("the artefact is written")
        assert proxy.num_cuts == 2
    # Nobody listens there any more.
    with _from(url, tmp_path / "cache") as second:
        assert _tokens(second) == wanted
        assert "fetch" not in _phases(second)
        assert _boot(second)["artefact"] == "artefact"


def test_what_is_not_there_costs_one_line_and_exit_code_2(tmp_path: Path) -> None:
    with nginx(tmp_path, tmp_path / "nginx") as web:
        url = f"http://nobody:secret@127.0.0.1:{web.port}/nothing/"
        flags = (url, "--cache", str(tmp_path / "cache"))
        with server_process(*flags, is_ready=False) as server:
            assert server.wait_exit() == 2
            line = server.last_line()
    assert "config.json" in line or "404" in line
    assert not any("secret" in line for line in server.log)


def test_a_place_needs_a_cache() -> None:
    with server_process("hf://some/model", "--cache", "off", is_ready=False) as server:
        assert server.wait_exit() == 2
        assert "--cache is off" in server.last_line()


def test_a_warm_replica_loads_from_a_url(tmp_path: Path, wanted: list[int]) -> None:
    flags = ("--standby", "--admin-port", "0", "--cache", str(tmp_path / "cache"))
    with (
        nginx(DEMO_MODEL, tmp_path / "nginx") as web,
        server_process(*flags, is_ready=False) as server,
        grpc.insecure_channel(server.admin) as channel,
    ):
        for status in server.stub.WatchStartup(pb.WatchStartupRequest(), timeout=LIMIT_S):
            if status.state == pb.SERVER_STATE_STANDBY:
                break
        orders = admin_grpc.AdminStub(channel)
        with pytest.raises(grpc.RpcError) as refusal:
            orders.LoadModel(admin.LoadModelRequest(model=f"{web.url}/nothing/"), timeout=LIMIT_S)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        loaded = orders.LoadModel(
            admin.LoadModelRequest(model=f"{web.url}/", model_name="demo"), timeout=LIMIT_S
        )
        assert loaded.state == pb.SERVER_STATE_READY
        assert "fetch" in [phase.name for phase in loaded.phases]
        assert _tokens(server) == wanted
