"""A server with OpenAI's HTTP interface as a target of the same load: `/v1/completions`, streamed.

So that another engine's server meets the same requests at the same times. Token ids go in as the
prompt, which vLLM and others take; tokens are counted by the usage that they report with each piece
(`continuous_usage_stats`). Knows HTTP and that interface; plans, measures and prints nothing.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import httpx2 as httpx

from ..proto import inference_pb2 as pb

REACH_S = 10.0


class TargetError(Exception):
    """The server's answer to one request is no success."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Tokens(NamedTuple):
    """Newly arrived; which they are is not told."""

    token_ids: range


class OpenAiStub:
    """As much of the gRPC stub as a load needs, spoken as OpenAI's interface."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model

    async def Generate(
        self, request: pb.GenerateRequest, timeout: float | None = None
    ) -> AsyncIterator[Tokens]:
        """Raises TargetError."""
        num_known = 0
        body = completion(request, self._model)
        try:
            async with self._client.stream(
                "POST", "/v1/completions", json=body, timeout=timeout
            ) as response:
                if response.status_code != httpx.codes.OK:
                    text = (await response.aread()).decode(errors="replace")
                    raise TargetError(f"HTTP {response.status_code}", text[:200])
                async for line in response.aiter_lines():
                    num_tokens = num_tokens_of(line, num_known)
                    yield Tokens(range(num_known, num_tokens))
                    num_known = num_tokens
        except httpx.HTTPError as error:
            raise TargetError(type(error).__name__, str(error)) from error


def completion(request: pb.GenerateRequest, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(request.token_ids.ids),
        "max_tokens": request.stop.max_tokens,
        "ignore_eos": request.stop.ignore_eos,
        "temperature": request.sampling.temperature,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


def num_tokens_of(line: str, num_known: int) -> int:
    """Tokens of the answer so far, by a line of the event stream; others tell nothing new."""
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return num_known
    piece = json.loads(data)
    if "error" in piece:
        raise TargetError("ERROR", str(piece["error"])[:200])
    usage = piece.get("usage") or {}
    return max(num_known, int(usage.get("completion_tokens", num_known)))


async def model_of(client: httpx.AsyncClient) -> tuple[str, int]:
    """Name and context of the first model that is served. Raises TargetError."""
    try:
        answer = await client.get("/v1/models", timeout=REACH_S)
        answer.raise_for_status()
        first = answer.json()["data"][0]
        return str(first["id"]), int(first.get("max_model_len") or 0)
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise TargetError(
            "UNREACHABLE", f"{client.base_url} has no models to tell: {error!r}"
        ) from error
