"""The first boot serves and writes the artefact behind itself; the second maps it."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from pilotlight.proto import inference_pb2 as pb
from pilotlight.tests.processes.server_process import ServerProcess, server_process


def _tokens(server: ServerProcess) -> list[int]:
    return [i for chunk in server.stream(12) for i in chunk.token_ids]


def _load_detail(server: ServerProcess) -> str:
    with urllib.request.urlopen(f"{server.ops}/startup", timeout=20) as response:
        boot = json.load(response)
    names = [phase["name"] for phase in boot["phases"]]
    assert "verify" in names
    detail: str = boot["artefact"]
    return detail


def test_the_second_boot_maps_what_the_first_has_written(tmp_path: Path) -> None:
    with server_process("--cache", str(tmp_path)) as first:
        wanted = _tokens(first)
        assert _load_detail(first).startswith("checkpoint")
        first.wait_log("the artefact is written")
    with server_process("--cache", str(tmp_path)) as second:
        assert _load_detail(second) == "artefact"
        assert _tokens(second) == wanted
        info = second.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=20)
        assert info.state == pb.SERVER_STATE_READY
