"""The first boot serves and writes the artefact behind itself; the second maps it."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest
from pilotlight.engine.models.artefact import build
from pilotlight.proto import inference_pb2 as pb
from pilotlight.server.config import DEMO_MODEL
from pilotlight.tests.processes.server_process import ServerProcess, server_process
from pilotlight.weights_cache import checked
from pilotlight.weights_cache.store import Store


def _tokens(server: ServerProcess) -> list[int]:
    return [i for chunk in server.stream(12) for i in chunk.token_ids]


def _num_blocks(server: ServerProcess) -> int:
    info = server.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=20)
    num_blocks: int = info.num_blocks
    return num_blocks


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


# ---- the plan of last time ---------------------------------------------------------------------


def test_a_boot_has_the_capacity_of_the_last(tmp_path: Path) -> None:
    build(Store(tmp_path), DEMO_MODEL)
    plan = next((tmp_path / "arenas").iterdir()) / "plan.json"
    with server_process("--cache", str(tmp_path)) as server:
        _tokens(server)  # computed after the plan was written
    written = json.loads(plan.read_text())["content"]
    smaller = written | {"num_blocks": written["num_blocks"] // 2}
    for content, is_used in ((smaller, True), (smaller | {"num_blocks": 1 << 40}, False)):
        plan.write_bytes(checked.encode(content))
        with server_process("--cache", str(tmp_path)) as server:
            assert (_num_blocks(server) == smaller["num_blocks"]) is is_used
            _tokens(server)
        assert json.loads(plan.read_text())["content"]["num_blocks"] < 1 << 40


@pytest.mark.parametrize("content", [b"", b"{", checked.encode({"num_blocks": 7})])
def test_a_plan_that_says_nothing_is_not_followed(content: bytes, tmp_path: Path) -> None:
    build(Store(tmp_path), DEMO_MODEL)
    plan = next((tmp_path / "arenas").iterdir()) / "plan.json"
    plan.write_bytes(content)
    with server_process("--cache", str(tmp_path)) as server:
        assert _num_blocks(server) > 7
        _tokens(server)
    assert json.loads(plan.read_text())["content"]["num_blocks"] > 7


# ---- a cache that cannot be written ------------------------------------------------------------


def _read_only(folder: Path) -> Sequence[str]:
    """A command under which another sees `folder` so: a mount for root, whom no mode binds."""
    if os.getuid() != 0:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        return ()
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    behind = ("unshare", "--mount", "sh", "-c", script, str(folder))
    if subprocess.run((*behind, "true"), capture_output=True, check=False).returncode:
        pytest.skip("neither modes nor a mount make a folder read-only here")
    return behind


def _content(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


def test_a_read_only_cache_serves_what_is_in_it(tmp_path: Path) -> None:
    build(Store(tmp_path), DEMO_MODEL)
    behind = _read_only(tmp_path)
    before = _content(tmp_path)
    with server_process("--cache", str(tmp_path), behind=behind) as server:
        assert _load_detail(server) == "artefact"
        assert len(_tokens(server)) == 12
    assert _content(tmp_path) == before


def test_a_read_only_cache_without_an_artefact_says_that_none_is_written(tmp_path: Path) -> None:
    Store(tmp_path)
    behind = _read_only(tmp_path)
    with server_process("--cache", str(tmp_path), behind=behind) as server:
        assert _load_detail(server).startswith("checkpoint")
        server.wait_log("no artefact is written")
        assert len(_tokens(server)) == 12
