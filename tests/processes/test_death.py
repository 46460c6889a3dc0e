"""Real signals to real processes: who dies, who notices, who comes back."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from pilotlight.engine.channel import frame
from pilotlight.engine.config import EngineConfig
from pilotlight.engine.messages import Boot, Stop
from pilotlight.engine.spawn import spawn
from pilotlight.proto import inference_pb2 as pb
from pilotlight.tests.processes.server_process import (
    NOT_SERVING,
    SERVING,
    ServerProcess,
    server_process,
    wait_gone,
)

MANY_TOKENS = 2000
QUICK = ("--restart-backoff", "0", "--heartbeat-timeout", "0.5", "--stall-kill", "0.5")


def _ended_by(stream: Iterator[pb.GenerateChunk]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as error:
        list(stream)
    code: grpc.StatusCode = error.value.code()
    return code


def _serves(server: ServerProcess) -> bool:
    server.wait_readiness(SERVING)
    return list(server.stream(4))[-1].usage.output_tokens == 4


def test_a_killed_engine_is_replaced() -> None:
    with server_process(*QUICK) as server:
        stream = server.stream(MANY_TOKENS)
        next(stream)
        first_pid = server.engine_pid()
        os.kill(first_pid, signal.SIGKILL)
        assert _ended_by(stream) is grpc.StatusCode.ABORTED
        assert _serves(server)
        assert server.engine_pid() != first_pid


def test_a_stopped_engine_is_noticed_killed_and_replaced() -> None:
    with server_process(*QUICK) as server:
        stream = server.stream(MANY_TOKENS)
        next(stream)
        first_pid = server.engine_pid()
        os.kill(first_pid, signal.SIGSTOP)
        server.wait_readiness(NOT_SERVING)
        assert server.health("liveness") == SERVING
        assert _ended_by(stream) is grpc.StatusCode.ABORTED
        assert wait_gone(first_pid)
        assert _serves(server)


def test_an_engine_that_goes_on_is_ready_again() -> None:
    with server_process("--heartbeat-timeout", "0.5", "--stall-kill", "60") as server:
        stream = server.stream(200)
        next(stream)
        pid = server.engine_pid()
        os.kill(pid, signal.SIGSTOP)
        server.wait_readiness(NOT_SERVING)
        os.kill(pid, signal.SIGCONT)
        server.wait_readiness(SERVING)
        assert list(stream)[-1].usage.output_tokens == 200, "the stream lived through it"
        assert server.engine_pid() == pid


def test_with_exit_the_server_ends_with_code_1() -> None:
    with server_process("--on-engine-failure", "exit") as server:
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert server.wait_exit() == 1
        assert "SIGKILL" in server.last_line()


def test_no_engine_outlives_its_front() -> None:
    with server_process() as server:
        pid = server.engine_pid()
        server.signal(signal.SIGKILL)
        assert wait_gone(pid)


def test_an_engine_that_waits_for_its_model_ends_when_it_is_told_to(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        engine = spawn()
        try:
            engine.socket.sendall(frame(Boot(EngineConfig(model=url, cache=str(tmp_path)))))
            connection, _ = silent.accept()
            with connection:
                engine.socket.sendall(frame(Stop()))
                # A fetch gives up on a silent server after 30 s.
                assert engine.process.wait(20) == 0
        finally:
            engine.discard()
