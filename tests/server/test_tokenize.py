"""Tokenize and Detokenize over gRPC."""

from __future__ import annotations

import grpc
import pytest
from pilotlight.proto import inference_pb2 as pb
from pilotlight.tests.served import details_of, served
from pilotlight.tests.server.wire import VOCAB_SIZE, reason_of, refusal, text_engine, tokenizer

TEXT = "naïve 🔥 = def f(x):\n"


async def test_text_goes_there_and_back() -> None:
    async with served(text_engine()) as s:
        token_ids = (await s.stub.Tokenize(pb.TokenizeRequest(text=TEXT))).token_ids
        text = (await s.stub.Detokenize(pb.DetokenizeRequest(token_ids=token_ids))).text
    assert list(token_ids) == tokenizer().encode(TEXT, add_special_tokens=True)
    assert text == TEXT


async def test_chat_is_tokenised_as_generate_would() -> None:
    request = pb.TokenizeRequest()
    request.chat.messages.add(role="user", content="Hello")
    async with served(text_engine()) as s:
        token_ids = (await s.stub.Tokenize(request)).token_ids
    turns = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert list(token_ids) == tokenizer().encode(turns, add_special_tokens=False)


@pytest.mark.parametrize(("skips", "text"), [(None, "a"), (True, "a"), (False, "a<|im_end|>")])
async def test_special_tokens_are_shown_when_asked_for(skips: bool | None, text: str) -> None:
    a = tokenizer().encode("a", add_special_tokens=False)
    request = pb.DetokenizeRequest(token_ids=[*a, 2], skip_special_tokens=skips)
    async with served(text_engine()) as s:
        assert (await s.stub.Detokenize(request)).text == text


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 2**40])
async def test_ids_outside_the_vocabulary_are_refused(token_id: int) -> None:
    async with served(text_engine()) as s:
        error = await refusal(s.stub.Detokenize(pb.DetokenizeRequest(token_ids=[1, token_id])))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details_of(error)["ErrorInfo"].metadata["field"] == "token_ids[1]"
    assert str(token_id) in error.details()


async def test_text_needs_a_tokenizer(tmp_path: object) -> None:
    async with served(model=str(tmp_path)) as s:
        error = await refusal(s.stub.Tokenize(pb.TokenizeRequest(text=TEXT)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "tokenizer.json" in error.details()


async def test_both_answer_while_the_model_still_loads() -> None:
    async with served(text_engine(boots=False), is_ready=False) as s:
        await s.until(lambda: s.server.text.is_loaded)
        token_ids = (await s.stub.Tokenize(pb.TokenizeRequest(text=TEXT))).token_ids
        text = (await s.stub.Detokenize(pb.DetokenizeRequest(token_ids=token_ids))).text
    assert text == TEXT


async def test_before_the_tokenizer_is_there_both_are_unavailable() -> None:
    async with served(text_engine()) as s:
        s.server.text.is_loaded = False
        error = await refusal(s.stub.Tokenize(pb.TokenizeRequest(text=TEXT)))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert reason_of(error) == "NOT_READY"
    assert details_of(error)["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0
