"""A GPTQ checkpoint behind a real server: packed at its first boot, mapped at its second."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from pilotlight.server.config import DEMO_MODEL
from pilotlight.tests.models.quantized_checkpoints import Kind, write
from pilotlight.tests.processes.server_process import ServerProcess, server_process
from pilotlight.tests.weights_cache.fake_world import settle
from pilotlight.weights_cache.store import Store


def _tokens(server: ServerProcess) -> list[int]:
    return [i for chunk in server.stream(12) for i in chunk.token_ids]


@pytest.mark.parametrize("kind", [Kind(4, 64), Kind(8, 64, sym=False, desc_act=True)], ids=str)
def test_both_boots_give_the_tokens_of_the_floats_that_are_meant(
    kind: Kind, tmp_path: Path
) -> None:
    folder = write(DEMO_MODEL, tmp_path / "q", kind)
    flags = ("--dtype", "float32", "--cache", str(tmp_path / "cache"))
    with server_process(str(tmp_path / "q-float"), "--dtype", "float32") as server:
        wanted = _tokens(server)
    with server_process(str(folder), *flags) as first:
        assert _tokens(first) == wanted
        first.wait_log("the artefact is written")
    settle(Store(tmp_path / "cache"))
    with server_process(str(folder), *flags) as second:
        with urllib.request.urlopen(f"{second.ops}/startup", timeout=20) as response:
            boot = json.load(response)
        assert (boot["artefact"], boot["weights"]["copied_bytes"]) == ("artefact", 0)
        assert boot["quantisation"].startswith(f"gptq int{kind.bits}")
        assert _tokens(second) == wanted
