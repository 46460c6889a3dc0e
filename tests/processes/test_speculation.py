"""Drafts from flag to metric: real servers with and without them, the built-in model."""

from __future__ import annotations

import re
import urllib.request

from pilotlight.bench.speculation import TEXTS
from pilotlight.proto import inference_pb2 as pb
from pilotlight.tests.processes.server_process import LIMIT_S, ServerProcess, server_process

NAMES = ("drafted", "accepted")


def answer(server: ServerProcess, temperature: float) -> pb.Completion:
    request = pb.GenerateRequest(text=TEXTS["code"])
    request.sampling.temperature = temperature
    request.sampling.seed = 3
    request.stop.max_tokens = 96
    request.stop.ignore_eos = True
    request.output.logprobs = 1
    (completion,) = server.stub.Complete(request, timeout=LIMIT_S).completions
    return completion


def drafts(server: ServerProcess) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.ops}/metrics", timeout=LIMIT_S) as response:
        text = response.read().decode()
    return {
        name: float(re.findall(rf"^pilotlight_{name}_tokens_total (\S+)$", text, re.MULTILINE)[0])
        for name in NAMES
    }


def is_counted(server: ServerProcess) -> bool:
    """The counts are those of the newest heartbeat: asks until one has come, or gives up."""
    return any(
        counts["drafted"] >= counts["accepted"] > 10
        for counts in (drafts(server) for _ in range(2000))
    )


def test_answers_are_the_same_with_drafts() -> None:
    with server_process("--speculative", "off", "--num-threads", "1") as server:
        expected = [answer(server, temperature) for temperature in (0.0, 0.7)]
    with server_process("--speculative", "ngram", "--num-threads", "1") as server:
        assert [answer(server, temperature) for temperature in (0.0, 0.7)] == expected
        assert is_counted(server)
