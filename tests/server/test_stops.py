"""Where an answer ends: stop strings, stop tokens, the end token, and how many tokens."""

from __future__ import annotations

import pytest
from pilotlight.engine.messages import Abort, FinishReason
from pilotlight.proto import inference_pb2 as pb
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.fake_runner import tokens_alone
from pilotlight.tests.served import Served, ids_request, served
from pilotlight.tests.server.wire import (
    gained,
    ids_of,
    read,
    say,
    submitted,
    text_engine,
    text_of,
    text_request,
    tokenizer,
)

TOKENS = tokens_alone([1, 2, 3], 8, 200)
"""What the fake engine makes of the prompt 1, 2, 3."""


def _stopping(*strings: str, n: int = 1, max_tokens: int = 50) -> pb.GenerateRequest:
    request = text_request("def f():", max_tokens, request_id="a")
    request.stop.strings.extend(strings)
    request.sampling.n = n
    return request


def _say_text(s: Served, text: str, index: int = 0) -> int:
    """The sequence gains the text, one token a step; returns the number of tokens."""
    token_ids = tokenizer().encode(text, add_special_tokens=False)
    for token_id in token_ids:
        say(s, gained("a", [token_id], index))
    return len(token_ids)


# ---- stop strings ------------------------------------------------------------------------------


@pytest.mark.parametrize(("includes", "text"), [(False, "x = 1\n"), (True, "x = 1\nreturn")])
async def test_the_text_ends_at_the_stop_string(includes: bool, text: str) -> None:
    request = _stopping("return")
    request.stop.include_stop_string = includes
    async with served(text_engine(is_held=True)) as s:
        call = s.stub.Generate(request)
        await submitted(s, "a")
        _say_text(s, "x = 1\nreturn x + 2")
        chunks = await read(call)
    assert text_of(chunks) == text
    assert chunks[-1].finish_reason == pb.FINISH_REASON_STOP
    assert chunks[-1].stop_string == "return"
    assert chunks[-1].usage.output_tokens == len(ids_of(chunks))


async def test_no_stop_string_ends_before_min_tokens() -> None:
    """Its text is then like any other, and no part of one that comes later."""
    early, late = "return x\nret", "urn return y"
    request = _stopping("return")
    request.stop.min_tokens = len(tokenizer().encode(early, add_special_tokens=False))
    async with served(text_engine(is_held=True)) as s:
        call = s.stub.Generate(request)
        await submitted(s, "a")
        _say_text(s, early)
        _say_text(s, late)
        chunks = await read(call)
    assert text_of(chunks) == early + "urn "
    assert chunks[-1].stop_string == "return"


async def test_a_stop_string_ends_the_engines_work() -> None:
    engine = text_engine(context_len=2048, num_blocks=512)
    async with served(engine) as s:
        [completion] = (await s.stub.Complete(_stopping("e", max_tokens=2000))).completions
        assert completion.stop_string == "e"
        await s.until(lambda: not engine.link.core.has_work)
        assert Abort(["a"]) in engine.link.received
        assert engine.link.core.statistics().num_used_blocks == 0
        assert engine.link.core.statistics().num_computed_tokens < 1000


async def test_a_stop_string_across_tokens_is_never_seen_in_part() -> None:
    async with served(text_engine(is_held=True)) as s:
        chunks = aiter(s.stub.Generate(_stopping("<end of it>")))
        await submitted(s, "a")
        num_tokens = _say_text(s, "one <end")
        shown = [await anext(chunks)]
        while shown[-1].num_output_tokens < num_tokens:
            shown.append(await anext(chunks))
        assert text_of(shown) == "one ", "what may begin the stop string is held back"
        _say_text(s, " of it> two")
        rest = await read(chunks)
    assert text_of(rest) == ""
    assert rest[-1].stop_string == "<end of it>"


async def test_what_only_looked_like_a_stop_string_is_given_out() -> None:
    async with served(text_engine(is_held=True)) as s:
        call = s.stub.Generate(_stopping("<end of it>"))
        await submitted(s, "a")
        _say_text(s, "one <end of")
        say(s, gained("a", [], finish_reason=FinishReason.LENGTH))
        chunks = await read(call)
    assert text_of(chunks) == "one <end of"
    assert chunks[-1].WhichOneof("stopped_by") is None


async def test_a_stop_string_ends_its_own_sample_only() -> None:
    async with served(text_engine(is_held=True)) as s:
        call = s.stub.Generate(_stopping("stop", n=2))
        await submitted(s, "a")
        _say_text(s, "a stop here", index=1)
        _say_text(s, "go on", index=0)
        await s.until(lambda: Abort(["a"], 1) in s.engine.link.received)
        assert Abort(["a"]) not in s.engine.link.received
        _say_text(s, " and on", index=0)
        say(s, gained("a", [], 1, FinishReason.ABORTED), gained("a", [], 0, FinishReason.LENGTH))
        chunks = await read(call)
    assert (text_of(chunks, 0), text_of(chunks, 1)) == ("go on and on", "a ")
    endings = {c.index: c.finish_reason for c in chunks if c.finish_reason}
    assert endings == {0: pb.FINISH_REASON_LENGTH, 1: pb.FINISH_REASON_STOP}


async def test_characters_come_whole_however_tokens_cut_them() -> None:
    text = "naïve 🔥🧯 漢字 done"
    async with served(text_engine(is_held=True)) as s:
        call = s.stub.Generate(_stopping("🧯"))
        await submitted(s, "a")
        _say_text(s, text)
        chunks = await read(call)
    assert text_of(chunks) == "naïve 🔥"
    assert not any("\ufffd" in chunk.text for chunk in chunks)


async def test_tokens_behind_a_stop_string_do_not_count_when_they_come_with_it() -> None:
    """A step with right drafts brings several tokens at once; the stop string ends among them."""
    request = _stopping("return")
    request.output.logprobs = 0
    token_ids = tokenizer().encode("x = 1\nreturn x + 2", add_special_tokens=False)
    texts = [tokenizer().decode(token_ids[:n], True) for n in range(len(token_ids) + 1)]
    num_kept = next(n for n, text in enumerate(texts) if "return" in text)
    assert num_kept < len(token_ids)
    at_once = gained("a", token_ids, finish_reason=FinishReason.LENGTH)
    at_once.logprobs = [-1.0 - i for i in range(len(token_ids))]
    at_once.top_logprobs = [[] for _ in token_ids]
    async with served(text_engine(is_held=True)) as s:
        call = s.stub.Generate(request)
        await submitted(s, "a")
        say(s, at_once)
        chunks = await read(call)
    assert text_of(chunks) == "x = 1\n"
    assert ids_of(chunks) == token_ids[:num_kept]
    assert chunks[-1].usage.output_tokens == num_kept
    logprobs = [entry.logprob for chunk in chunks for entry in chunk.logprobs]
    assert logprobs == at_once.logprobs[:num_kept]
    assert chunks[-1].stop_string == "return"


# ---- stop tokens -------------------------------------------------------------------------------


def _text_ids_request(stop_ids: list[int], max_tokens: int = 8) -> pb.GenerateRequest:
    request = ids_request([1, 2, 3], max_tokens)
    request.stop.token_ids.extend(stop_ids)
    return request


async def test_a_stop_token_ends_the_answer_and_is_its_last_token() -> None:
    async with served() as s:
        chunks = await read(s.stub.Generate(_text_ids_request([TOKENS[3]])))
    assert ids_of(chunks) == TOKENS[:4]
    assert chunks[-1].finish_reason == pb.FINISH_REASON_STOP
    assert chunks[-1].stop_token_id == TOKENS[3]


@pytest.mark.parametrize("stop_token", ["<|im_end|>", "x"])
@pytest.mark.parametrize("skips", [True, False])
async def test_a_stop_token_is_shown_only_with_special_tokens(skips: bool, stop_token: str) -> None:
    [stop_id] = tokenizer().encode(stop_token, add_special_tokens=False)
    request = _stopping()
    request.output.skip_special_tokens = skips
    async with served(text_engine(is_held=True)) as s:
        call = s.stub.Generate(request)
        await submitted(s, "a")
        _say_text(s, "ab")
        end = gained("a", [stop_id], finish_reason=FinishReason.STOP)
        end.stop_token_id = stop_id
        say(s, end)
        chunks = await read(call)
    assert text_of(chunks) == "ab" + stop_token * (not skips)
    assert ids_of(chunks)[-1] == chunks[-1].stop_token_id == stop_id


@pytest.mark.parametrize(("ignores", "num_tokens"), [(False, 3), (True, 8)])
async def test_the_models_end_token_ends_unless_ignored(ignores: bool, num_tokens: int) -> None:
    request = ids_request([1, 2, 3], 8)
    request.stop.ignore_eos = ignores
    async with served(FakeEngine(eos_token_ids=(TOKENS[2],))) as s:
        [completion] = (await s.stub.Complete(request)).completions
    assert list(completion.token_ids) == TOKENS[:num_tokens]
    assert (completion.finish_reason == pb.FINISH_REASON_STOP) == (not ignores)


@pytest.mark.parametrize(("min_tokens", "num_tokens"), [(0, 3), (2, 3), (3, 8)])
async def test_no_stop_token_ends_before_min_tokens(min_tokens: int, num_tokens: int) -> None:
    request = _text_ids_request([TOKENS[2]])
    request.stop.min_tokens = min_tokens
    async with served() as s:
        [completion] = (await s.stub.Complete(request)).completions
    assert len(completion.token_ids) == num_tokens


@pytest.mark.parametrize("max_tokens", [1, 5])
async def test_max_tokens_is_exact(max_tokens: int) -> None:
    async with served() as s:
        [completion] = (await s.stub.Complete(_text_ids_request([], max_tokens))).completions
    assert list(completion.token_ids) == TOKENS[:max_tokens]
    assert completion.finish_reason == pb.FINISH_REASON_LENGTH
    assert completion.WhichOneof("stopped_by") is None


async def test_a_sequence_that_cannot_be_computed_is_our_fault_unless_another_one_could() -> None:
    request = _stopping(n=2)
    async with served(text_engine(is_held=True)) as s:
        call = s.stub.Generate(request)
        await submitted(s, "a")
        failed = gained("a", [], 0, FinishReason.ERROR)
        failed.error = "not finite"
        say(s, failed, gained("a", [7], 1, FinishReason.LENGTH))
        chunks = await read(call)
    endings = {c.index: c.finish_reason for c in chunks}
    assert endings == {0: pb.FINISH_REASON_ERROR, 1: pb.FINISH_REASON_LENGTH}
