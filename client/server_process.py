"""A `pilotlight serve` as a child process: started, waited for, drained. For demo and benches.

Knows the command line of the server and its wire contract, as any user would.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

BOOT_TIMEOUT_S = 120.0
DRAIN_TIMEOUT_S = 30.0

Say = Callable[[str], None]


@contextmanager
def served(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A server process on free ports of loopback, and its first log record."""
    command = (sys.executable, "-m", "pilotlight", "serve", "--port", "0", "--ops-port", "0")
    process = subprocess.Popen((*command, *arguments), stderr=subprocess.PIPE, text=True)
    try:
        yield process, first_record(process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def first_record(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The log line that tells where the ports are."""
    assert process.stderr is not None
    for line in process.stderr:
        record: dict[str, Any] = json.loads(line) if line.startswith("{") else {}
        if "target" in record:
            return record
        print(line, end="", file=sys.stderr)
    raise SystemExit(f"pilotlight: the server ended with code {process.wait()}")


def wait_ready(channel: grpc.Channel, say: Say) -> None:
    """Follows grpc.health.v1 Watch until `readiness` is SERVING."""
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="readiness")
    for response in stub.Watch(request, timeout=BOOT_TIMEOUT_S):
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
        say(f"readiness is {name}")
        if response.status == health_pb2.HealthCheckResponse.SERVING:
            return


def drained(process: subprocess.Popen[str], say: Say) -> int:
    """SIGTERM, and the exit code of the drain."""
    began_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        _, _ = process.communicate(timeout=DRAIN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        say("the server did not drain")
        return 1
    elapsed_s = time.monotonic() - began_s
    say(f"drained in {elapsed_s:.2f} s, exit code {process.returncode}")
    return process.returncode
