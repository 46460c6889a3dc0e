"""Who comes in: limits by count, by tokens and by time, decided before anything is tokenised."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from pilotlight.engine.messages import Output, StepRecord
from pilotlight.engine.status import EngineState
from pilotlight.proto import inference_pb2 as pb
from pilotlight.server.admission import BYTES_PER_TOKEN, Admission, Pace
from pilotlight.server.text.chat import ChatTemplate
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.served import Served, details_of, ids_request, served
from pilotlight.tests.server.wire import (
    SlowTokenizer,
    chat_request,
    read,
    reason_of,
    refusal,
    submitted,
    text_engine,
    text_request,
    tokenizer,
)


class CountingTokenizer:
    """The demo model's, with the number of times it was asked to encode."""

    def __init__(self) -> None:
        self.num_encoded = 0

    def max_chars(self, num_tokens: int) -> int:
        return tokenizer().max_chars(num_tokens)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        self.num_encoded += 1
        return tokenizer().encode(text, add_special_tokens)

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return tokenizer().decode(token_ids, skip_special_tokens)


async def _load(s: Served) -> tuple[int, int]:
    """Places and prompt tokens that are taken."""
    load = await s.stub.GetLoad(pb.GetLoadRequest())
    return load.num_admitted_requests, load.num_admitted_prompt_tokens


async def _hold(s: Served, request_id: str, num_prompt_tokens: int, n: int = 1) -> Any:
    """A request that the held engine has and does not touch."""
    request = ids_request([1] * num_prompt_tokens, request_id=request_id)
    request.sampling.n = n
    call = s.stub.Generate(request)
    await submitted(s, request_id)
    return call


def _assert_full(error: grpc.aio.AioRpcError, quota: str, limit: int) -> None:
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason_of(error) == "QUEUE_FULL"
    details = details_of(error)
    assert [v.subject for v in details["QuotaFailure"].violations] == [quota]
    assert str(limit) in details["QuotaFailure"].violations[0].description
    assert details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0


# ---- limits ------------------------------------------------------------------------------------


async def test_full_by_count() -> None:
    async with served(FakeEngine(is_held=True), max_queued_requests=2) as s:
        first = await _hold(s, "a", 3)
        await _hold(s, "b", 3)
        error = await refusal(s.stub.Generate(ids_request([1])))
        first.cancel()
        await s.until(lambda: len(s.server.requests) == 1)
        await _hold(s, "c", 3)
    _assert_full(error, "max_queued_requests", 2)


@pytest.mark.parametrize(("n", "comes_in"), [(2, True), (3, False)])
async def test_every_sample_counts(n: int, comes_in: bool) -> None:
    request = ids_request([1, 2, 3], request_id="b")
    request.sampling.n = n
    async with served(FakeEngine(is_held=True), max_queued_requests=4) as s:
        await _hold(s, "a", 3, n=2)
        call = s.stub.Generate(request)
        if comes_in:
            await submitted(s, "b")
            assert await _load(s) == (4, 6)
        else:
            _assert_full(await refusal(call), "max_queued_requests", 4)
            assert await _load(s) == (2, 3)


async def test_full_by_prompt_tokens() -> None:
    async with served(FakeEngine(is_held=True), max_queued_tokens=20) as s:
        await _hold(s, "a", 15)
        error = await refusal(s.stub.Generate(ids_request([1] * 6)))
        await _hold(s, "b", 5)
        assert await _load(s) == (2, 20)
    _assert_full(error, "max_queued_tokens", 20)


async def test_a_prompt_larger_than_the_quota_may_come_alone() -> None:
    async with served(FakeEngine(is_held=True), max_queued_tokens=20) as s:
        await _hold(s, "a", 50)
        _assert_full(await refusal(s.stub.Generate(ids_request([1]))), "max_queued_tokens", 20)


async def test_a_prompt_that_is_computed_stands_before_nobody() -> None:
    async with served(FakeEngine(is_held=True), max_queued_tokens=20) as s:
        stream = aiter(await _hold(s, "a", 20))
        s.engine.link.step()
        await anext(stream)
        assert await _load(s) == (1, 0)
        await _hold(s, "b", 20)


async def test_by_default_waiting_prompts_may_fill_the_cache_once() -> None:
    async with served(FakeEngine(num_blocks=64, block_size=4), max_num_seqs=8) as s:
        load = await s.stub.GetLoad(pb.GetLoadRequest())
        while load.max_admitted_prompt_tokens != 64 * 4:
            load = await s.stub.GetLoad(pb.GetLoadRequest())
    assert load.max_admitted_requests == 32


# ---- before tokenising -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"max_queued_requests": 1}, {"max_queued_tokens": 10}], ids=["count", "tokens"]
)
@pytest.mark.parametrize("make", [text_request, chat_request])
async def test_nothing_is_tokenised_for_a_request_that_is_refused(
    options: dict[str, int], make: Callable[[str], pb.GenerateRequest]
) -> None:
    async with served(text_engine(is_held=True), **options) as s:
        s.server.text.tokenizer = counting = CountingTokenizer()  # type: ignore[assignment]
        await _hold(s, "a", 9)
        error = await refusal(s.stub.Generate(make("some text that is longer than it seems")))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert counting.num_encoded == 0


async def test_nothing_is_tokenised_for_a_request_that_is_wrong() -> None:
    request = text_request("some text")
    request.sampling.temperature = -1.0
    async with served(text_engine()) as s:
        s.server.text.tokenizer = counting = CountingTokenizer()  # type: ignore[assignment]
        await refusal(s.stub.Generate(request))
        assert counting.num_encoded == 0
        await s.stub.Complete(text_request("some text"))
        assert counting.num_encoded == 1, "the counter counts"


async def test_a_chat_that_cannot_fit_is_refused_before_it_is_tokenised() -> None:
    async with served(text_engine()) as s:
        s.server.text.tokenizer = counting = CountingTokenizer()  # type: ignore[assignment]
        error = await refusal(s.stub.Generate(chat_request("x" * 1_000_000)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert counting.num_encoded == 0


@pytest.mark.parametrize("text", ["some text that is longer than it seems", "漢字" * 20])
async def test_text_counts_by_its_bytes_until_its_tokens_are_known(text: str) -> None:
    async with served(text_engine(is_held=True)) as s:
        s.server.text.tokenizer = slow = SlowTokenizer()  # type: ignore[assignment]
        call = s.stub.Generate(text_request(text, request_id="a"))
        await s.until(slow.is_entered.is_set)
        assert await _load(s) == (1, -(-len(text.encode()) // BYTES_PER_TOKEN))
        slow.may_go_on.set()
        await submitted(s, "a")
        assert await _load(s) == (1, 3)
        call.cancel()


# ---- time --------------------------------------------------------------------------------------


def _prefill(num_tokens: int, duration_s: float) -> StepRecord:
    return StepRecord(1, [], 0.0, duration_s, num_tokens)


async def _say_prefill(s: Served, num_tokens: int, duration_s: float) -> None:
    """The server hears of a step of this speed."""
    heard: list[StepRecord] = []
    s.server.engine.listen_steps(heard.append)
    s.engine.link.say(_prefill(num_tokens, duration_s))
    await s.until(lambda: bool(heard))


async def test_a_deadline_that_the_queue_cannot_meet_is_refused_at_once() -> None:
    async with served(FakeEngine(is_held=True)) as s:
        await _hold(s, "a", 100)
        await _say_prefill(s, num_tokens=10, duration_s=100.0)
        error = await refusal(s.stub.Generate(ids_request([1]), timeout=500.0))
        patient = s.stub.Generate(ids_request([1], request_id="patient"), timeout=5000.0)
        await submitted(s, "patient")
        patient.cancel()
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert reason_of(error) == "DEADLINE_EXPIRED"
    assert "about 1000.000 s" in error.details()


async def test_the_pause_that_is_advised_is_the_queues_length() -> None:
    async with served(FakeEngine(is_held=True), max_queued_requests=1) as s:
        await _hold(s, "a", 100)
        await _say_prefill(s, num_tokens=100, duration_s=10.0)
        error = await refusal(s.stub.Generate(ids_request([1])))
    assert details_of(error)["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == 10.0


def test_the_pace_is_that_of_steps_with_prompts() -> None:
    pace = Pace()
    assert pace.seconds_for(1000) == 0.0, "nothing is known"
    decodes = [Output(f"r{i}", 0, [1]) for i in range(4)]
    pace.hear(StepRecord(1, decodes, 0.0, 1.0, 4))
    assert pace.tokens_per_s == 0.0, "decodes alone say little"
    pace.hear(_prefill(100, 1.0))
    assert pace.seconds_for(200) == 2.0
    pace.hear(_prefill(200, 1.0))
    assert 100.0 < pace.tokens_per_s < 200.0


# ---- given back --------------------------------------------------------------------------------


def test_a_place_is_given_back_once_whatever_is_called_how_often() -> None:
    admission = Admission(10, 100, Pace(), lambda _: None)
    place, other = admission.admit(2, 30, None), admission.admit(1, 20, None)
    admission.correct(place, 10)
    assert (admission.num_requests, admission.num_prompt_tokens) == (3, 30)
    for _ in range(2):
        admission.start(place)
    assert admission.num_prompt_tokens == 20
    for _ in range(2):
        admission.release(place)
    assert (admission.num_requests, admission.num_prompt_tokens) == (1, 20)
    admission.release(other)
    assert (admission.num_requests, admission.num_prompt_tokens) == (0, 0)


async def _finishes(s: Served) -> None:
    s.engine.link.release()
    await s.stub.Complete(ids_request([1, 2, 3]))


async def _stops_at_a_string(s: Served) -> None:
    request = text_request("def f():", 100)
    request.stop.strings.append("e")
    s.engine.link.release()
    assert (await s.stub.Complete(request)).completions[0].stop_string == "e"


async def _is_cancelled(s: Served) -> None:
    call = await _hold(s, "a", 3)
    assert await _load(s) == (1, 3)
    call.cancel()


async def _is_aborted(s: Served) -> None:
    call = await _hold(s, "a", 3)
    await s.stub.Abort(pb.AbortRequest(request_ids=["a"]))
    s.engine.link.step()
    await read(call)


async def _misses_its_deadline(s: Served) -> None:
    await refusal(s.stub.Generate(ids_request([1, 2, 3]), timeout=0.2))


async def _is_too_long_once_tokenised(s: Served) -> None:
    error = await refusal(s.stub.Generate(text_request("x\n" * 200)))
    assert "at most 255 tokens" in error.details()


async def _is_refused_by_the_template(s: Served) -> None:
    s.server.text.chat_template = ChatTemplate("{{ raise_exception('no') }}", {})
    await refusal(s.stub.Generate(chat_request("Hello")))


async def _loses_its_engine(s: Served) -> None:
    call = await _hold(s, "a", 3)
    s.engine.link.end("killed by SIGKILL")
    await refusal(call)
    await s.until(lambda: len(s.engine.links) == 2)
    await s.wait_state(EngineState.READY)


async def _is_a_duplicate(s: Served) -> None:
    call = await _hold(s, "a", 3)
    error = await refusal(s.stub.Generate(ids_request([1], request_id="a")))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert await _load(s) == (1, 3)
    call.cancel()


ENDINGS: list[Callable[[Served], Awaitable[None]]] = [
    _finishes,
    _stops_at_a_string,
    _is_cancelled,
    _is_aborted,
    _misses_its_deadline,
    _is_too_long_once_tokenised,
    _is_refused_by_the_template,
    _loses_its_engine,
    _is_a_duplicate,
]


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__[1:])
async def test_the_place_is_free_after_every_ending(
    ending: Callable[[Served], Awaitable[None]],
) -> None:
    async with served(text_engine(is_held=True)) as s:
        await ending(s)
        await s.until(lambda: len(s.server.requests) == 0)
        assert await _load(s) == (0, 0)
