"""SIGTERM to a real server under load."""

from __future__ import annotations

import signal
import threading

import grpc
import pytest
from pilotlight.proto import inference_pb2 as pb
from pilotlight.tests.processes.server_process import (
    NOT_SERVING,
    SERVING,
    ServerProcess,
    server_process,
)

NUM_STREAMS = 12
NUM_TOKENS = 60


class Load:
    """Streams in threads; `started` when each was accepted, `results` when each ended."""

    def __init__(self, server: ServerProcess) -> None:
        self.results: list[pb.GenerateChunk | grpc.RpcError] = []
        self._barrier = threading.Barrier(NUM_STREAMS + 1)
        self._threads = [
            threading.Thread(target=self._run, args=(server,)) for _ in range(NUM_STREAMS)
        ]
        for thread in self._threads:
            thread.start()

    def wait_accepted(self) -> None:
        """Every stream has its first chunk; four at a time run, so the last ones hardly began."""
        self._barrier.wait(60)

    def wait_ended(self) -> None:
        for thread in self._threads:
            thread.join(60)

    def _run(self, server: ServerProcess) -> None:
        stream = server.stream(NUM_TOKENS)
        next(stream)
        self._barrier.wait(60)
        try:
            self.results.append(list(stream)[-1])
        except grpc.RpcError as error:
            self.results.append(error)


def test_sigterm_loses_nothing_that_was_accepted() -> None:
    with server_process("--drain-timeout", "60") as server:
        load = Load(server)
        load.wait_accepted()
        server.signal(signal.SIGTERM)
        load.wait_ended()
        assert server.wait_exit() == 0
        tokens = [getattr(result, "usage", result) for result in load.results]
        assert [usage.output_tokens for usage in tokens] == [NUM_TOKENS] * NUM_STREAMS


def test_while_draining_new_work_is_refused_and_readiness_is_off() -> None:
    with server_process("--drain-timeout", "60") as server:
        stream = server.stream(2000)
        next(stream)
        server.signal(signal.SIGTERM)
        server.wait_readiness(NOT_SERVING)
        assert server.health("liveness") == SERVING
        with pytest.raises(grpc.RpcError) as refusal:
            list(server.stream(4))
        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in refusal.value.details()
        stream.cancel()  # type: ignore[attr-defined]
        assert server.wait_exit() == 0


def test_what_does_not_finish_in_time_is_told_so() -> None:
    with server_process("--drain-timeout", "0.2") as server:
        stream = server.stream(2000)
        next(stream)
        server.signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as cut:
            list(stream)
        assert cut.value.code() is grpc.StatusCode.ABORTED
        assert server.wait_exit() == 0


def test_a_second_sigterm_ends_at_once() -> None:
    with server_process("--drain-timeout", "3600") as server:
        next(server.stream(2000))
        server.signal(signal.SIGTERM)
        server.wait_readiness(NOT_SERVING)
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 128 + signal.SIGTERM
