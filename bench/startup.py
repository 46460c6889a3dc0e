"""`pilotlight bench startup`: process start to open ports, to readiness, to the first token.

Starts the real command as a user would, once per run, and asks for a token the moment readiness is
SERVING. Knows the command line and the wire contract, nothing of the engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import grpc

from ..client.server_process import drained, served, wait_ready
from ..proto import inference_pb2 as pb
from ..proto import inference_pb2_grpc as pb_grpc
from ..server.config import DEMO_MODEL


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="pilotlight bench startup", description=__doc__)
    help_text = "checkpoint folder (default: the built-in model)"
    parser.add_argument("model", nargs="?", default=str(DEMO_MODEL), help=help_text)
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    runs = [boot_once(arguments.model) for _ in range(arguments.repeat)]
    print(json.dumps({name: summary([run[name] for run in runs]) for name in runs[0]}))
    return 0


def boot_once(model: str) -> dict[str, float]:
    """Seconds since the process was started, by this process's clock."""
    began_s = time.monotonic()
    with served(model) as (process, ports):
        answered_s = time.monotonic() - began_s
        with grpc.insecure_channel(ports["target"]) as channel:
            wait_ready(channel, lambda name: None)
            ready_s = time.monotonic() - began_s
            next(iter(pb_grpc.InferenceStub(channel).Generate(one_token())))
            first_token_s = time.monotonic() - began_s
        if drained(process, lambda line: None) != 0:
            raise SystemExit("pilotlight: the server did not drain")
    print(f"pilotlight: first token after {first_token_s:.3f} s", file=sys.stderr)
    return {"ports_open_s": answered_s, "ready_s": ready_s, "first_token_s": first_token_s}


def one_token() -> pb.GenerateRequest:
    request = pb.GenerateRequest()
    request.token_ids.ids.append(0)
    request.stop.max_tokens = 1
    return request


def summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }
