"""What the tests of the gRPC face share: requests, answers, and engine records written by hand.

A held engine that never steps still has a channel: `say` sends what the test wants sequences to
have gained, so that tokens, and with them text, are the test's choice.
"""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections.abc import AsyncIterable, Awaitable, Iterable
from functools import cache
from typing import Any

import grpc.aio
import pytest
from pilotlight.engine.messages import (
    FinishReason,
    Output,
    StepRecord,
    Submit,
    TopLogprob,
)
from pilotlight.proto import inference_pb2 as pb
from pilotlight.server.config import DEMO_MODEL
from pilotlight.server.text.tokenizer import Tokenizer, load_tokenizer
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.served import LIMIT_S, Served, details_of

VOCAB_SIZE = 4096
"""Of the demo model, whose tokenizer the server under test has."""


@cache
def tokenizer() -> Tokenizer:
    found = load_tokenizer(DEMO_MODEL)
    assert found is not None
    return found


def text_engine(**sizes: Any) -> FakeEngine:
    """A fake engine with the demo model's vocabulary."""
    return FakeEngine(vocab_size=VOCAB_SIZE, **sizes)


class SlowTokenizer:
    """Encodes, to three tokens, when the test says so."""

    def __init__(self) -> None:
        self.is_entered = threading.Event()
        self.may_go_on = threading.Event()

    def max_chars(self, num_tokens: int) -> int:
        return tokenizer().max_chars(num_tokens)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        self.is_entered.set()
        assert self.may_go_on.wait(LIMIT_S)
        return [1, 2, 3]

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return ""


# ---- requests ----------------------------------------------------------------------------------


def text_request(text: str, max_tokens: int = 8, **fields: Any) -> pb.GenerateRequest:
    """Greedy, by text."""
    request = pb.GenerateRequest(text=text, **fields)
    return _greedy(request, max_tokens)


def chat_request(*contents: str, max_tokens: int = 8, **fields: Any) -> pb.GenerateRequest:
    """Greedy, by messages of one user."""
    request = pb.GenerateRequest(**fields)
    request.chat.SetInParent()
    for content in contents:
        request.chat.messages.add(role="user", content=content)
    return _greedy(request, max_tokens)


def _greedy(request: pb.GenerateRequest, max_tokens: int) -> pb.GenerateRequest:
    request.sampling.temperature = 0.0
    request.stop.max_tokens = max_tokens
    request.stop.ignore_eos = True
    return request


# ---- answers -----------------------------------------------------------------------------------


async def read(stream: AsyncIterable[Any]) -> list[Any]:
    """All of a stream."""
    async with asyncio.timeout(LIMIT_S):
        return [message async for message in stream]


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    """The status that a unary or a streaming call must end with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call if isinstance(call, Awaitable) else read(call))
    return caught.value


def reason_of(error: grpc.aio.AioRpcError) -> str:
    reason: str = details_of(error)["ErrorInfo"].reason
    return reason


def ids_of(chunks: Iterable[pb.GenerateChunk], index: int = 0) -> list[int]:
    return [i for chunk in chunks if chunk.index == index for i in chunk.token_ids]


def text_of(chunks: Iterable[pb.GenerateChunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


async def http_get(s: Served, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    """Status and body from the ops port."""

    def get() -> tuple[int, str]:
        connection = http.client.HTTPConnection(host, s.server.ops_port, timeout=LIMIT_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    return await asyncio.to_thread(get)


# ---- the engine's side -------------------------------------------------------------------------


async def submitted(s: Served, request_id: str) -> Submit:
    """Waits until the newest engine has the request."""
    found: list[Submit] = []

    def is_there() -> bool:
        messages = s.engine.link.received
        found[:] = [m for m in messages if isinstance(m, Submit) and m.request_id == request_id]
        return bool(found)

    await s.until(is_there)
    return found[-1]


def say(s: Served, *outputs: Output) -> None:
    """One step record of the newest engine, with these outputs."""
    s.engine.link.say(StepRecord(1, list(outputs), 0.0, 0.0, len(outputs)))


def gained(
    request_id: str,
    token_ids: list[int],
    index: int = 0,
    finish_reason: FinishReason = FinishReason.NONE,
    top: list[TopLogprob] | None = None,
) -> Output:
    """What one sequence gained in one step; with `top`, each token's likeliest alternatives."""
    output = Output(request_id, index, token_ids, finish_reason)
    if top is not None:
        output.logprobs = [-1.0] * len(token_ids)
        output.top_logprobs = [top] * len(token_ids)
    return output
