"""A real `pilotlight serve` as a child process, and what tests need to know of it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pilotlight.proto import inference_pb2 as pb
from pilotlight.proto import inference_pb2_grpc as pb_grpc

LIMIT_S = 60.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class ServerProcess:
    """Started with free ports on loopback; its log is read by a thread."""

    def __init__(self, *flags: str, behind: Sequence[str] = ()) -> None:
        serve = (sys.executable, "-m", "pilotlight", "serve", "--port", "0", "--ops-port", "0")
        command = (*serve, "--cache", "off")  # a later --cache of `flags` wins
        # `behind` is a command that ends by becoming another, whose words follow its own.
        command = (*behind, *command, *flags)
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        self._logged = threading.Condition()
        self._ports_known = threading.Event()
        self._ports: dict[str, str] = {}
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        assert self._ports_known.wait(LIMIT_S), "no ports within the limit"
        self.channel = grpc.insecure_channel(self._ports.get("target", "127.0.0.1:1"))
        self.stub = pb_grpc.InferenceStub(self.channel)
        self._health = health_pb2_grpc.HealthStub(self.channel)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._logged:
                self.log.append(line)
                self._logged.notify_all()
            if not self._ports_known.is_set() and '"target"' in line:
                self._ports = json.loads(line)
                self._ports_known.set()
        self._ports_known.set()

    # ---- what it says ------------------------------------------------------------------------

    @property
    def ops(self) -> str:
        return self._ports["ops"]

    @property
    def admin(self) -> str:
        """Where it was asked for."""
        return self._ports["admin"]

    def health(self, service: str) -> int:
        request = health_pb2.HealthCheckRequest(service=service)
        status: int = self._health.Check(request, timeout=LIMIT_S).status
        return status

    def wait_readiness(self, wanted: int) -> None:
        request = health_pb2.HealthCheckRequest(service="readiness")
        for response in self._health.Watch(request, timeout=LIMIT_S):
            if response.status == wanted:
                return

    def engine_pid(self) -> int:
        """The one child of the front."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(children.read_text().split()[0])

    def engine_bytes(self) -> int:
        """Memory of the engine that is nobody else's: no mapped files."""
        status = Path(f"/proc/{self.engine_pid()}/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    def uses_torch(self) -> bool:
        return "libtorch" in Path(f"/proc/{self.process.pid}/maps").read_text()

    def wait_log(self, text: str) -> None:
        """Until some process of the server has logged `text`."""
        with self._logged:
            found = self._logged.wait_for(lambda: any(text in line for line in self.log), LIMIT_S)
        assert found, self.log

    def last_line(self) -> str:
        """What a user reads when it is over: the last thing that is no log record."""
        self._reader.join(LIMIT_S)
        return next((line for line in reversed(self.log) if not line.startswith("{")), "")

    # ---- what is done to it ----------------------------------------------------------------------

    def stream(self, max_tokens: int, **fields: str) -> Iterator[pb.GenerateChunk]:
        request = pb.GenerateRequest(**fields)
        request.token_ids.ids.extend([5, 6, 7, 8])
        request.sampling.temperature = 0.0
        request.stop.max_tokens = max_tokens
        request.stop.ignore_eos = True
        return self.stub.Generate(request, timeout=LIMIT_S)  # type: ignore[no-any-return]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait_exit(self) -> int:
        return self.process.wait(LIMIT_S)

    def end(self) -> None:
        self.channel.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(LIMIT_S)
        self._reader.join(LIMIT_S)
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def server_process(
    *flags: str, is_ready: bool = True, behind: Sequence[str] = ()
) -> Iterator[ServerProcess]:
    server = ServerProcess(*flags, behind=behind)
    try:
        if is_ready:
            server.wait_readiness(SERVING)
        yield server
    finally:
        server.end()


def is_alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(pid: int) -> bool:
    """Blocks until the process ended, or the limit passed."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], LIMIT_S)[0])
    finally:
        os.close(handle)
