"""One start of the real command, timed where a user stands: cold, warm or from standby.

Knows the command line, the wire contract and what /proc tells of the server's processes; nothing
of the engine.
"""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from ..client.server_process import drained, served, wait_ready
from ..engine.errors import ConfigError
from ..proto import admin_pb2, admin_pb2_grpc
from ..proto import inference_pb2 as pb
from ..proto import inference_pb2_grpc as pb_grpc
from .startup_figures import Span, Start, attributed, spans_of

TIMEOUT_S = 600.0
POLL_S = 0.1
NUM_WARM_UPS = 3
ARENA_NAME = "arena.bin"
BUILDER = "pilotlight.engine.build_artefact"

Say = Callable[[str], None]


def time_start(model: str, flags: Sequence[str]) -> Start:
    """Seconds since the moment before the spawn, by this process's clock; the server is drained."""
    began_s = time.monotonic()
    with _running(model, *flags) as (process, ports):
        moments = {"ports_open_s": time.monotonic() - began_s}
        with grpc.insecure_channel(ports["target"]) as channel:
            wait_ready(channel, lambda _text: None)
            moments["ready_s"] = time.monotonic() - began_s
            await_token(channel)
            moments["first_token_s"] = time.monotonic() - began_s
        startup = read_startup(ports)
        mapped = mapped_artefact(process.pid)
    facts = {"artefact": startup.get("artefact", ""), "mapped": mapped}
    explained = attributed(startup, moments["ready_s"])
    return Start(moments, spans_of(startup), explained, facts)


def time_standby(model: str, flags: Sequence[str]) -> Start:
    """Seconds since LoadModel was sent to a server that stands by without a model."""
    with _running("--standby", "--admin-port", "0", *flags) as (_, ports):
        with (
            grpc.insecure_channel(ports["target"]) as channel,
            grpc.insecure_channel(ports["admin"]) as orders,
        ):
            _await_standby(channel)
            request = admin_pb2.LoadModelRequest(model=str(Path(model).resolve()))
            began_s = time.monotonic()
            loaded = admin_pb2_grpc.AdminStub(orders).LoadModel(request, timeout=TIMEOUT_S)
            ready_s = time.monotonic() - began_s
            await_token(channel)
            first_token_s = time.monotonic() - began_s
    spans, reached_s = [], 0.0
    for phase in loaded.phases:
        spans.append(Span(phase.name, reached_s, phase.duration_s))
        reached_s += phase.duration_s
    moments = {"ready_s": ready_s, "first_token_s": first_token_s}
    return Start(moments, tuple(spans), min(1.0, reached_s / ready_s))


def warm_up(model: str, flags: Sequence[str], say: Say) -> Path | None:
    """Starts until the artefact is what is loaded; its file, or None where the server keeps none.

    The artefact is written behind READY by a process that this waits for.
    """
    for number in range(1, NUM_WARM_UPS + 1):
        say(f"warm-up {number}: the artefact is made if it is not there")
        with _running(model, *flags) as (process, ports):
            with grpc.insecure_channel(ports["target"]) as channel:
                wait_ready(channel, lambda _text: None)
                await_token(channel)
            mapped = mapped_artefact(process.pid)
            if mapped is not None or "no cache" in read_startup(ports).get("artefact", ""):
                return mapped
            _await_builder(process.pid)
    raise ConfigError(
        f"no artefact of {model} after {NUM_WARM_UPS} starts; see `pilotlight cache list`, or"
        " measure without one: --cache off"
    )


@contextmanager
def _running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    with served(*arguments) as (process, ports):
        yield process, ports
        if drained(process, lambda _text: None) != 0:
            raise SystemExit("pilotlight: the server did not drain")


def await_token(channel: grpc.Channel) -> None:
    """Until a token came over the wire."""
    request = pb.GenerateRequest()
    request.token_ids.ids.append(0)
    request.stop.max_tokens = 1
    request.stop.ignore_eos = True
    for chunk in pb_grpc.InferenceStub(channel).Generate(request, timeout=TIMEOUT_S):
        if chunk.token_ids:
            return
    raise SystemExit("pilotlight: the stream ended without a token")


def _await_standby(channel: grpc.Channel) -> None:
    watch = pb_grpc.InferenceStub(channel).WatchStartup
    for status in watch(pb.WatchStartupRequest(), timeout=TIMEOUT_S):
        if status.state == pb.SERVER_STATE_STANDBY:
            return
    raise SystemExit("pilotlight: the server ended before it stood by")


def read_startup(ports: dict[str, Any]) -> dict[str, Any]:
    with urllib.request.urlopen(f"{ports['ops']}/startup", timeout=TIMEOUT_S) as answer:
        startup: dict[str, Any] = json.load(answer)
    return startup


def mapped_artefact(pid: int) -> Path | None:
    """The artefact that the server's engine has mapped."""
    for one in process_tree(pid):
        for line in _read(one, "maps").splitlines():
            path = Path(line.partition("/")[2])
            if path.name == ARENA_NAME:
                return Path("/") / path
    return None


def _await_builder(pid: int) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while any(BUILDER in _read(one, "cmdline") for one in process_tree(pid)):
        if time.monotonic() > deadline_s:
            raise ConfigError(f"the artefact was not written within {TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)


def process_tree(pid: int) -> list[int]:
    """The process and all below it, those that every of its threads started."""
    found = [pid]
    for one in found:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except OSError:  # a thread that ended meanwhile
                continue
    return found


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""
