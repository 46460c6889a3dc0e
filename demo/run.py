"""`make demo`: a server with the built-in model, from boot to drain, seen by a real client.

Knows the wire contract, as any user would.
"""

from __future__ import annotations

import json
import sys
import urllib.request

import grpc

from ..client.generate import stream_text, summary
from ..client.server_process import drained, served, wait_ready
from ..engine.messages import WeightsFacts
from ..engine.status import PhaseSpan
from ..proto import inference_pb2 as pb
from ..proto import inference_pb2_grpc as pb_grpc
from ..server.timeline import timeline_lines

PROMPT = 'def read_lines(path):\n    """'
MAX_TOKENS = 96


def say(line: str) -> None:
    print(f"pilotlight: {line}", flush=True)


def main() -> int:
    say("starting a server with the built-in model")
    with served() as (process, ports):
        target = ports["target"]
        say(f"ports open after {ports['ports_open_s']:.2f} s, gRPC on {target}")
        with grpc.insecure_channel(target) as channel:
            wait_ready(channel, say)
            show_boot(ports["ops"])
            complete(channel)
        return drained(process, say)


def show_boot(ops: str) -> None:
    with urllib.request.urlopen(f"{ops}/startup", timeout=5) as response:
        boot = json.load(response)
    phases, beside = (
        tuple(PhaseSpan(s["name"], s["started_s"], s["s"], s.get("lane", "")) for s in boot[key])
        for key in ("phases", "beside")
    )
    lines = timeline_lines(phases, beside, WeightsFacts(**boot["weights"]))
    print("\n".join(lines), flush=True)


def complete(channel: grpc.Channel) -> None:
    request = pb.GenerateRequest(text=PROMPT)
    request.sampling.temperature = 0.0
    request.sampling.repetition_penalty = 1.15
    request.stop.max_tokens = MAX_TOKENS
    request.stop.strings.append("\n\n\n")
    print(f"\n{PROMPT}", end="", flush=True)
    result = stream_text(pb_grpc.InferenceStub(channel).Generate(request, timeout=60), sys.stdout)
    say(summary(result))
