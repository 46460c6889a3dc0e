"""The truth about a boot, told while it happens: two real processes, the built-in model."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request

from pilotlight.proto import inference_pb2 as pb
from pilotlight.tests.processes.server_process import NOT_SERVING, SERVING, server_process


def _http(url: str) -> tuple[int, dict[str, object]]:
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_ports_answer_before_the_model_is_there() -> None:
    with server_process(is_ready=False) as server:
        assert server.health("liveness") == SERVING
        # A stopped engine cannot become ready: what follows is no race.
        os.kill(server.engine_pid(), signal.SIGSTOP)
        assert server.health("readiness") == NOT_SERVING
        assert _http(f"{server.ops}/livez")[0] == 200
        assert _http(f"{server.ops}/readyz")[0] == 503
        os.kill(server.engine_pid(), signal.SIGCONT)
        seen = list(server.stub.WatchStartup(pb.WatchStartupRequest(), timeout=60))
        assert seen[-1].state == pb.SERVER_STATE_READY
        elapsed_s = [status.elapsed_s for status in seen]
        assert elapsed_s == sorted(elapsed_s)
        assert len(seen) > 3, "the boot was seen moving"
        assert server.health("readiness") == SERVING
        assert not server.uses_torch()


def test_the_named_phases_are_the_whole_boot() -> None:
    with server_process() as server:
        boot = _http(f"{server.ops}/startup")[1]
        phases = boot["phases"]
        assert isinstance(phases, list)
        total_s = sum(phase["s"] for phase in phases)
        ready_s = phases[-1]["started_s"] + phases[-1]["s"]
        assert total_s >= 0.98 * ready_s
        assert boot["attributed"] >= 0.98
        assert {span["lane"] for span in boot["beside"]} >= {"front", "torch"}
        names = [phase["name"] for phase in phases]
        assert names[:2] == ["start_process", "start_engine"]
        assert names[-2:] == ["warm", "verify"]
