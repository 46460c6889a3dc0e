"""Generate and Complete over real gRPC, with a fake engine behind."""

from __future__ import annotations

import pytest
from pilotlight.proto import inference_pb2 as pb
from pilotlight.tests.fake_runner import tokens_alone
from pilotlight.tests.served import ids_request, served


async def test_streams_the_tokens_and_ends_with_usage() -> None:
    async with served() as s:
        chunks = [chunk async for chunk in s.stub.Generate(ids_request([1, 2, 3], 8))]
    token_ids = [i for chunk in chunks for i in chunk.token_ids]
    assert token_ids == tokens_alone([1, 2, 3], 8, 200)
    assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert chunks[-1].usage.output_tokens == 8
    assert chunks[-1].usage.prompt_tokens == 3
    assert [chunk.HasField("usage") for chunk in chunks[:-1]] == [False] * (len(chunks) - 1)
