"""`pilotlight admin`: one order to a server's admin port, and what came of it.

Knows the wire contract only; what an order means is the server's business.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import grpc

from ..engine.errors import ConfigError
from ..proto import admin_pb2 as pb
from ..proto import admin_pb2_grpc as pb_grpc
from ..proto.inference_pb2 import ServerState
from .generate import describe


def give_order(
    target: str,
    order: str,
    model: str,
    options: Mapping[str, Any],
    as_json: bool,
    timeout_s: float,
    out: TextIO = sys.stdout,
) -> int:
    """Waits until it is done; returns the exit code. `model` and `options` belong to load."""
    with grpc.insecure_channel(target) as channel:
        stub = pb_grpc.AdminStub(channel)
        try:
            match order:
                case "load":
                    response = stub.LoadModel(_load_request(model, options), timeout=timeout_s)
                case "unload":
                    response = stub.UnloadModel(pb.UnloadModelRequest(), timeout=timeout_s)
                case "sleep":
                    response = stub.Sleep(pb.SleepRequest(), timeout=timeout_s)
                case _:
                    response = stub.Wake(pb.WakeRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            print(f"pilotlight: {describe(error)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("pilotlight: left; the server goes on with the order", file=sys.stderr)
            return 130
    result = _fields(response)
    print(json.dumps(result) if as_json else _text(result), file=out)
    return 0


def _load_request(model: str, options: Mapping[str, Any]) -> pb.LoadModelRequest:
    """A folder that is here is named in full: the server has another working directory."""
    named = str(Path(model).resolve()) if model and Path(model).is_dir() else model
    try:
        return pb.LoadModelRequest(model=named, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"a value does not fit its field: {error}") from error


def _fields(response: pb.AdminResponse) -> dict[str, Any]:
    return {
        "state": ServerState.Name(response.state).removeprefix("SERVER_STATE_"),
        "ready_s": round(response.ready_s, 6),
        "phases": [
            {"name": p.name, "started_s": round(p.started_s, 6), "s": round(p.duration_s, 6)}
            for p in response.phases
        ],
    }


def _text(result: Mapping[str, Any]) -> str:
    lines = [f"  {phase['name']:<14}{phase['s']:8.3f} s" for phase in result["phases"]]
    ready = f"{result['ready_s']:8.3f} s after it was asked for" if result["ready_s"] else ""
    return "\n".join([*lines, f"  {result['state']:<14}{ready}".rstrip()])
