"""The server that a load goes to: ours by gRPC, or another's by OpenAI's interface.

Knows how to reach them and what to ask of them first; sends no load.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import grpc.aio
import httpx2 as httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ..proto import inference_pb2 as pb
from ..proto import inference_pb2_grpc as pb_grpc
from .openai_target import OpenAiStub, TargetError, model_of

REACH_S = 10.0
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 16 << 20),
    # A server that is awaited is seen soon after it is there.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class Unreachable(Exception):
    """No server, or none that can take load. The message is one readable line."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server that has a model, and what a load must know of it."""

    name: str
    stub: pb_grpc.InferenceStub | OpenAiStub
    model: str
    vocab_size: int
    context_len: int


@asynccontextmanager
async def reached(arguments: argparse.Namespace) -> AsyncIterator[Target]:
    """Raises Unreachable."""
    if arguments.openai:
        async with _openai_target(arguments) as target:
            yield target
        return
    name = arguments.target
    async with grpc.aio.insecure_channel(name, options=CHANNEL_OPTIONS) as channel:
        if arguments.wait_ready:
            await _wait_ready(channel, name, arguments.wait_ready)
        stub = pb_grpc.InferenceStub(channel)
        info = await _model_info(stub, name)
        yield Target(name, stub, info.name, info.vocab_size, info.context_len)


@asynccontextmanager
async def _openai_target(arguments: argparse.Namespace) -> AsyncIterator[Target]:
    # As many connections as requests: a pool with fewer would queue them in the client.
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=arguments.openai, limits=limits) as client:
        try:
            model, context_len = await model_of(client)
        except TargetError as error:
            raise Unreachable(str(error)) from error
        context_len = context_len or arguments.openai_context_len
        stub = OpenAiStub(client, model)
        yield Target(arguments.openai, stub, model, arguments.openai_vocab_size, context_len)


async def _wait_ready(channel: grpc.aio.Channel, target: str, limit_s: float) -> None:
    """Follows the server's own readiness; a server that is not there yet is waited for too."""
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="readiness")
    try:
        watch = stub.Watch(request, timeout=limit_s, wait_for_ready=True)
        async for response in watch:
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise Unreachable(f"{target} was not ready within {limit_s:g} s") from error
        reason = f"{error.code().name}: {error.details()}"
        raise Unreachable(f"{target} ended before it was ready ({reason})") from error
    raise Unreachable(f"{target} ended before it was ready")


async def _model_info(stub: pb_grpc.InferenceStub, target: str) -> pb.GetModelInfoResponse:
    try:
        info: pb.GetModelInfoResponse = await stub.GetModelInfo(
            pb.GetModelInfoRequest(), timeout=REACH_S
        )
    except grpc.aio.AioRpcError as error:
        hint = "is `pilotlight serve` running there?"
        raise Unreachable(f"no answer from {target} ({error.code().name}); {hint}") from error
    if not info.vocab_size:
        raise Unreachable(f"{target} is still loading its model; --wait-ready SECONDS waits for it")
    return info
