"""`pilotlight generate`: one request, printed as it streams. Knows the wire contract only."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from ..proto import inference_pb2 as pb
from ..proto import inference_pb2_grpc as pb_grpc

CHANNEL_OPTIONS = (("grpc.max_receive_message_length", 16 << 20),)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Exactly one of the three."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    user_message: str = ""

    def fill(self, request: pb.GenerateRequest) -> None:
        if self.token_ids:
            request.token_ids.ids.extend(self.token_ids)
        elif self.user_message:
            request.chat.messages.add(role="user", content=self.user_message)
        else:
            request.text = self.text


def generate(
    target: str,
    request: pb.GenerateRequest,
    *,
    as_json: bool,
    timeout_s: float | None = None,
    out: TextIO = sys.stdout,
) -> int:
    """Streams the answer to `out`; returns the exit code. With `as_json` the last line is JSON."""
    with grpc.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
        try:
            stream = pb_grpc.InferenceStub(channel).Generate(request, timeout=timeout_s)
            result = stream_text(stream, out)
        except grpc.RpcError as error:
            print(f"\npilotlight: {describe(error)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\npilotlight: cancelled", file=sys.stderr)
            return 130
    if as_json:
        print(json.dumps(result), file=out)
    else:
        print(summary(result), file=sys.stderr)
    return 0


def stream_text(stream: Iterator[pb.GenerateChunk], out: TextIO) -> dict[str, Any]:
    """Prints the text of sample 0 as it comes; returns the whole answer."""
    began_s, first_s = time.monotonic(), 0.0
    samples: dict[int, dict[str, Any]] = {}
    usage, timings = pb.Usage(), pb.Timings()
    for chunk in stream:
        first_s = first_s or time.monotonic() - began_s
        sample = samples.setdefault(chunk.index, {"text": "", "token_ids": [], "finish_reason": ""})
        _extend(sample, chunk)
        if chunk.index == 0:
            print(chunk.text, end="", file=out, flush=True)
        if chunk.HasField("usage"):
            usage, timings = chunk.usage, chunk.timings
    print(file=out, flush=True)
    ordered = [samples[index] for index in sorted(samples)]
    others = {"samples": ordered} if len(ordered) > 1 else {}
    return {
        **ordered[0],
        **others,
        "usage": _fields(usage),
        "timings": {**_fields(timings), "client_first_chunk_s": round(first_s, 6)},
    }


def _extend(sample: dict[str, Any], chunk: pb.GenerateChunk) -> None:
    sample["text"] += chunk.text
    sample["token_ids"] += chunk.token_ids
    if chunk.finish_reason:
        name = pb.FinishReason.Name(chunk.finish_reason)
        sample["finish_reason"] = name.removeprefix("FINISH_REASON_").lower()


def _fields(message: pb.Usage | pb.Timings) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}


def summary(result: dict[str, Any]) -> str:
    usage, timings = result["usage"], result["timings"]
    return (
        f"[{usage['prompt_tokens']} tokens in, {usage['output_tokens']} out, first after "
        f"{timings['first_token_s'] * 1000:.0f} ms, then {timings['output_tokens_per_s']:.0f} "
        f"tokens/s, ended by {result['finish_reason']}]"
    )


def describe(error: grpc.RpcError) -> str:
    """A status as one line, with what its details say about when to come back."""
    line = f"{error.code().name}: {error.details()}"
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details if status else ():
        retry = error_details_pb2.RetryInfo()
        if detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
            line += f" (retry after {retry.retry_delay.ToTimedelta().total_seconds():.1f} s)"
    return line
