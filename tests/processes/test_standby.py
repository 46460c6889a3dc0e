"""A warm pool's replica, for real: no model, a model, asleep, awake, none again; and one killed."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
from pilotlight.proto import admin_pb2 as admin
from pilotlight.proto import admin_pb2_grpc as admin_grpc
from pilotlight.proto import inference_pb2 as pb
from pilotlight.tests.processes.server_process import (
    LIMIT_S,
    NOT_SERVING,
    SERVING,
    ServerProcess,
    server_process,
)

LOAD = admin.LoadModelRequest(model_name="demo")


@contextmanager
def _on_standby(*flags: str) -> Iterator[tuple[ServerProcess, admin_grpc.AdminStub]]:
    with server_process("--standby", "--admin-port", "0", *flags, is_ready=False) as server:
        with grpc.insecure_channel(server.admin) as channel:
            _wait_standby(server)
            yield server, admin_grpc.AdminStub(channel)


def _wait_standby(server: ServerProcess) -> pb.StartupStatus:
    for status in server.stub.WatchStartup(pb.WatchStartupRequest(), timeout=LIMIT_S):
        if status.state == pb.SERVER_STATE_STANDBY:
            return status
    raise AssertionError("the watch ended before standby")


def _token_ids(server: ServerProcess) -> list[int]:
    return [i for chunk in server.stream(8) for i in chunk.token_ids]


def test_a_replica_of_a_warm_pool_from_standby_to_its_end() -> None:
    with _on_standby() as (server, orders):
        assert server.health("liveness") == SERVING
        assert server.health("readiness") == NOT_SERVING
        idle_bytes = server.engine_bytes()

        loaded = orders.LoadModel(LOAD, timeout=LIMIT_S)
        assert loaded.state == pb.SERVER_STATE_READY
        assert server.health("readiness") == SERVING
        phases_s = sum(phase.duration_s for phase in loaded.phases)
        assert loaded.phases[0].name == "accept"
        assert phases_s >= 0.98 * loaded.ready_s
        token_ids = _token_ids(server)
        assert len(token_ids) == 8
        weight_bytes = server.stub.GetModelInfo(pb.GetModelInfoRequest()).weight_bytes
        loaded_bytes = server.engine_bytes()
        assert loaded_bytes > idle_bytes

        asleep = orders.Sleep(admin.SleepRequest(), timeout=LIMIT_S)
        assert asleep.state == pb.SERVER_STATE_SLEEPING
        assert server.engine_bytes() < loaded_bytes - weight_bytes / 2

        awake = orders.Wake(admin.WakeRequest(), timeout=LIMIT_S)
        assert awake.state == pb.SERVER_STATE_READY
        assert _token_ids(server) == token_ids

        unloaded = orders.UnloadModel(admin.UnloadModelRequest(), timeout=LIMIT_S)
        assert unloaded.state == pb.SERVER_STATE_STANDBY
        with pytest.raises(grpc.RpcError) as refusal:
            orders.LoadModel(admin.LoadModelRequest(model="/no/such/folder"), timeout=LIMIT_S)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "/no/such/folder" in refusal.value.details()
        with urllib.request.urlopen(f"{server.ops}/startup", timeout=LIMIT_S) as response:
            assert json.load(response)["state"] == "STANDBY"

        assert orders.LoadModel(LOAD, timeout=LIMIT_S).state == pb.SERVER_STATE_READY
        assert _token_ids(server) == token_ids
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0


def test_a_replica_killed_on_standby_is_on_standby_again() -> None:
    with _on_standby("--restart-backoff", "0") as (server, orders):
        watch = server.stub.WatchStartup(pb.WatchStartupRequest(), timeout=LIMIT_S)
        assert next(watch).state == pb.SERVER_STATE_STANDBY
        os.kill(server.engine_pid(), signal.SIGKILL)
        # On standby a watch speaks only when something changes: what comes next is the restart.
        assert next(watch).state == pb.SERVER_STATE_STARTING
        while next(watch).state != pb.SERVER_STATE_STANDBY:
            pass
        assert orders.LoadModel(LOAD, timeout=LIMIT_S).state == pb.SERVER_STATE_READY
        assert len(_token_ids(server)) == 8


def test_a_replica_on_standby_ends_with_code_0() -> None:
    with _on_standby() as (server, _):
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0
