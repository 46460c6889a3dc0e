"""Every way to ask for something wrong: field, value and limit are named, the next succeeds.

The table of cases is held against server/limits.py: a limit without a case fails a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from pilotlight.proto import inference_pb2 as pb
from pilotlight.server.limits import LIMITS, MAX_MESSAGE_BYTES
from pilotlight.server.text.chat import ChatTemplate
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.served import Served, details_of, ids_request, served
from pilotlight.tests.server.wire import (
    VOCAB_SIZE,
    chat_request,
    ids_of,
    read,
    reason_of,
    refusal,
    text_engine,
    text_request,
)

CONTEXT_LEN = 64
NAN, INFINITY = float("nan"), float("inf")
Edit = Callable[[pb.GenerateRequest], Any]


@dataclass(frozen=True)
class Case:
    """`edit` spoils a good request; `field`, `value` and `limit` must be named."""

    field: str
    value: str
    limit: str
    edit: Edit


def _set(field: str, value: float) -> Edit:
    group, _, name = field.rpartition(".")
    return lambda request: setattr(getattr(request, group), name, value)


def _extend(field: str, values: list[Any]) -> Edit:
    group, _, name = field.rpartition(".")
    return lambda request: getattr(getattr(request, group), name).extend(values)


def _prompt(other: pb.GenerateRequest) -> Edit:
    """The same request with another's prompt."""

    def edit(request: pb.GenerateRequest) -> None:
        request.ClearField("token_ids")
        request.MergeFrom(other)

    return edit


def _prompt_ids(*token_ids: int) -> Edit:
    return _prompt(ids_request(list(token_ids)))


def _messages(count: int, role: str = "user") -> Edit:
    message = pb.ChatMessage(role=role, content="x")
    return _prompt(pb.GenerateRequest(chat=pb.Chat(messages=[message] * count)))


def _bias(token_id: int, bias: float) -> Edit:
    return lambda request: request.sampling.logit_bias.update({token_id: bias})


def _biases(count: int) -> Edit:
    return lambda request: request.sampling.logit_bias.update(dict.fromkeys(range(count), 1.0))


# ---- the table ---------------------------------------------------------------------------------

NUMBERS = [
    f"{group}.{field.name}"
    for group, message in (
        ("sampling", pb.SamplingOptions),
        ("stop", pb.StopOptions),
        ("output", pb.OutputOptions),
    )
    for field in message.DESCRIPTOR.fields
    if field.cpp_type in (field.CPPTYPE_DOUBLE, field.CPPTYPE_INT64) and not field.is_repeated
]
"""Every numeric field of a request but the seed, which may be anything: from the proto itself."""

DOUBLES = [
    f"sampling.{field.name}"
    for field in pb.SamplingOptions.DESCRIPTOR.fields
    if field.cpp_type == field.CPPTYPE_DOUBLE
]


def _outside(field: str) -> list[float]:
    """The nearest bad values, and the farthest."""
    limit = LIMITS[field]
    if field in DOUBLES:
        step = 1e-7
        return [limit.low - step, limit.high + step, -1e308, 1e308]
    return [int(limit.low) - 1, int(limit.high) + 1, -(2**63), 2**63 - 1]


OUT_OF_RANGE = {
    f"{field} = {value!r}": Case(field, repr(value), LIMITS[field].text(), _set(field, value))
    for field in NUMBERS
    for value in _outside(field)
}
NOT_FINITE = {
    f"{field} = {value!r}": Case(field, repr(value), "must be a finite number", _set(field, value))
    for field in DOUBLES
    for value in (NAN, INFINITY, -INFINITY)
}
SIZES = {
    "no prompt": Case(
        "prompt", "absent", "text, token_ids and chat", lambda r: r.ClearField("token_ids")
    ),
    "empty text": Case("prompt", "empty", "at least 1 token", _prompt(text_request(""))),
    "empty token_ids": Case("prompt", "empty", "at least 1 token", _prompt_ids()),
    "token_ids as long as the context": Case(
        "prompt", "64 tokens", "at most 63 tokens", _prompt_ids(*range(CONTEXT_LEN))
    ),
    "text longer than the context": Case(
        "prompt", "100 tokens", "at most 63 tokens", _prompt(text_request("x\n" * 50))
    ),
    "text much longer": Case(
        "prompt", "1000000 characters", "context of 64 tokens", _prompt(text_request("x" * 10**6))
    ),
    "chat longer than the context": Case(
        "prompt", "tokens", "at most 63 tokens", _prompt(chat_request("x\n" * 50))
    ),
    "chat much longer": Case(
        "prompt", "characters", "context of 64 tokens", _prompt(chat_request("x" * 10**6))
    ),
    "token id beyond the vocabulary": Case(
        "token_ids[2]", "4096", "0 to 4095", _prompt_ids(1, 2, VOCAB_SIZE)
    ),
    "negative token id": Case("token_ids[0]", "-1", "0 to 4095", _prompt_ids(-1)),
    "token id of 63 bits": Case(
        "token_ids[0]", str(2**63 - 1), "0 to 4095", _prompt_ids(2**63 - 1)
    ),
    "max_tokens beyond the context": Case(
        "stop.max_tokens", "65", "at most 64", _set("stop.max_tokens", CONTEXT_LEN + 1)
    ),
    "min_tokens beyond max_tokens": Case(
        "stop.min_tokens", "9", "max_tokens, 8", _set("stop.min_tokens", 9)
    ),
    "too many stop strings": Case(
        "stop.strings", "17 strings", "0 to 16 strings", _extend("stop.strings", ["x"] * 17)
    ),
    "empty stop string": Case(
        "stop.strings[1]", "0 bytes", "1 to 256 bytes", _extend("stop.strings", ["x", ""])
    ),
    "long stop string, in bytes": Case(
        "stop.strings[0]", "258 bytes", "1 to 256 bytes", _extend("stop.strings", ["é" * 129])
    ),
    "too many stop ids": Case(
        "stop.token_ids", "65 ids", "0 to 64 ids", _extend("stop.token_ids", [1] * 65)
    ),
    "stop id beyond the vocabulary": Case(
        "stop.token_ids[1]", "4096", "0 to 4095", _extend("stop.token_ids", [1, VOCAB_SIZE])
    ),
    "negative stop id": Case(
        "stop.token_ids[0]", "-5", "0 to 4095", _extend("stop.token_ids", [-5])
    ),
    "too many biases": Case(
        "sampling.logit_bias", "1025 entries", "0 to 1024 entries", _biases(1025)
    ),
    "bias of no token": Case("sampling.logit_bias key", "4096", "0 to 4095", _bias(4096, 1.0)),
    "bias of a negative token": Case("sampling.logit_bias key", "-1", "0 to 4095", _bias(-1, 1.0)),
    "bias too high": Case("sampling.logit_bias[3]", "100.5", "-100 to 100", _bias(3, 100.5)),
    "bias too low": Case("sampling.logit_bias[3]", "-100.5", "-100 to 100", _bias(3, -100.5)),
    "bias that is no number": Case("sampling.logit_bias[3]", "nan", "finite", _bias(3, NAN)),
    "no message": Case("chat.messages", "0 messages", "1 to 1024 messages", _messages(0)),
    "too many messages": Case(
        "chat.messages", "1025 messages", "1 to 1024 messages", _messages(1025)
    ),
    "message without role": Case(
        "chat.messages[0].role", "0 bytes", "1 to 64 bytes", _messages(2, "")
    ),
    "message with a long role": Case(
        "chat.messages[0].role", "65 bytes", "1 to 64 bytes", _messages(1, "r" * 65)
    ),
    "long request id": Case(
        "request_id", "130 bytes", "0 to 128 bytes", lambda r: setattr(r, "request_id", "é" * 65)
    ),
    "long cache salt": Case(
        "cache_salt", "129 bytes", "0 to 128 bytes", lambda r: setattr(r, "cache_salt", "s" * 129)
    ),
}
CASES = {**SIZES, **OUT_OF_RANGE, **NOT_FINITE}


def _engine() -> FakeEngine:
    return text_engine(context_len=CONTEXT_LEN)


async def _assert_serves(s: Served) -> None:
    """Whatever was asked before, a good request is answered and nothing of the bad one is left."""
    response = await s.stub.Complete(ids_request([1, 2, 3], 4))
    assert response.usage.output_tokens == 4
    load = await s.stub.GetLoad(pb.GetLoadRequest())
    assert (load.num_admitted_requests, load.num_admitted_prompt_tokens) == (0, 0)
    assert len(s.server.requests) == 0


@pytest.mark.parametrize("name", CASES)
async def test_a_bad_request_is_refused_by_name_and_the_next_succeeds(name: str) -> None:
    case = CASES[name]
    request = ids_request([1, 2, 3], 8)
    case.edit(request)
    async with served(_engine()) as s:
        error = await refusal(s.stub.Generate(request))
        await _assert_serves(s)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    for part in (case.field, case.value, case.limit):
        assert part in error.details()
    details = details_of(error)
    [violation] = details["BadRequest"].field_violations
    assert violation.field == case.field
    assert violation.description == error.details()
    info = details["ErrorInfo"]
    assert (info.reason, info.domain) == ("INVALID_FIELD", "pilotlight")
    assert info.metadata["field"] == case.field
    assert case.value in info.metadata["value"]
    assert case.limit in info.metadata["limit"]


def test_every_limit_has_a_case() -> None:
    fields = {case.field for case in CASES.values()}
    general = {field.rpartition("[")[0] + "[]" for field in fields if field.endswith("]")}
    general |= {"chat.messages[].role"} if "chat.messages[0].role" in fields else set()
    assert set(LIMITS) <= fields | general | {"request_ids"}, "see the Abort tests for the last"


def test_every_number_of_a_request_has_a_limit() -> None:
    assert set(NUMBERS) == set(LIMITS) & set(NUMBERS)
    assert len(NUMBERS) == 11


AT_THE_LIMIT = [
    (field, value)
    for field in NUMBERS
    if field not in ("stop.max_tokens", "stop.min_tokens")  # the context is the nearer limit
    for value in (LIMITS[field].low, LIMITS[field].high)
]


@pytest.mark.parametrize(("field", "value"), AT_THE_LIMIT)
async def test_what_is_just_inside_the_limit_is_served(field: str, value: float) -> None:
    request = ids_request([1, 2, 3], 2)
    _set(field, value if field in DOUBLES else int(value))(request)
    async with served(_engine()) as s:
        assert (await s.stub.Complete(request)).usage.output_tokens >= 2


async def test_the_longest_prompt_and_the_most_tokens_are_served() -> None:
    async with served(_engine()) as s:
        response = await s.stub.Complete(ids_request(list(range(CONTEXT_LEN - 1)), CONTEXT_LEN))
    assert response.usage == pb.Usage(prompt_tokens=CONTEXT_LEN - 1, output_tokens=1)


# ---- what is wrong in other ways ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt-99", "x" * 20_000, "名" * 5000])
async def test_an_unknown_model(name: str) -> None:
    """However long the name, the answer must fit into the metadata that clients accept."""
    async with served(_engine()) as s:
        error = await refusal(s.stub.Generate(ids_request([1, 2, 3], model=name)))
        await _assert_serves(s)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert reason_of(error) == "UNKNOWN_MODEL"
    assert "'model'" in error.details(), "the name of the model that is served"


async def test_an_id_that_is_live() -> None:
    async with served(FakeEngine(is_held=True)) as s:
        first = s.stub.Generate(ids_request([1, 2, 3], request_id="mine"))
        await s.until(lambda: len(s.server.requests) == 1)
        error = await refusal(s.stub.Generate(ids_request([1, 2, 3], request_id="mine")))
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
        assert reason_of(error) == "DUPLICATE_REQUEST"
        assert "'mine'" in error.details()
        s.engine.link.release()
        assert len(ids_of(await read(first))) == 8, "the first goes on"
        await s.stub.Complete(ids_request([1, 2, 3], request_id="mine"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content.no.such }}", "no element 7"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('long ' ~ '漢' * 9999) }}", "long"),
    ],
)
async def test_a_chat_template_that_raises(source: str, words: str) -> None:
    async with served(_engine()) as s:
        s.server.text.chat_template = ChatTemplate(source, {})
        error = await refusal(s.stub.Generate(chat_request("Hello")))
        await _assert_serves(s)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in error.details()
    [violation] = details_of(error)["BadRequest"].field_violations
    assert violation.field == "chat.messages"


async def test_a_chat_template_that_writes_nothing() -> None:
    async with served(_engine()) as s:
        s.server.text.chat_template = ChatTemplate("{# silence #}", {})
        error = await refusal(s.stub.Generate(chat_request("Hello")))
        await _assert_serves(s)
    assert "at least 1 token" in error.details()


@pytest.mark.parametrize(
    ("other", "field"),
    [(text_request("hello"), "prompt"), (chat_request("hello"), "prompt"), (None, "stop.strings")],
)
async def test_text_for_a_model_without_tokenizer(
    other: pb.GenerateRequest | None, field: str, tmp_path: Any
) -> None:
    request = ids_request([1, 2, 3])
    if other is None:
        request.stop.strings.append("x")
    else:
        _prompt(other)(request)
    async with served(model=str(tmp_path)) as s:
        error = await refusal(s.stub.Generate(request))
        await _assert_serves(s)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details_of(error)["ErrorInfo"].metadata["field"] == field
    assert "tokenizer.json" in error.details()


async def test_chat_for_a_model_without_template() -> None:
    async with served(_engine()) as s:
        s.server.text.chat_template = None
        error = await refusal(s.stub.Generate(chat_request("Hello")))
        await _assert_serves(s)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details_of(error)["ErrorInfo"].metadata["field"] == "chat"


async def test_a_message_that_is_too_large() -> None:
    async with served(_engine()) as s:
        error = await refusal(s.stub.Generate(text_request("x" * MAX_MESSAGE_BYTES)))
        await _assert_serves(s)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_metadata_that_is_too_large() -> None:
    async with served(_engine()) as s:
        call = s.stub.Generate(ids_request([1]), metadata=[("x-name", "x" * 40_000)])
        error = await refusal(call)
        await _assert_serves(s)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_deadline_that_has_passed() -> None:
    async with served(_engine()) as s:
        error = await refusal(s.stub.Generate(ids_request([1, 2, 3]), timeout=1e-6))
        await _assert_serves(s)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_bytes_that_are_no_request() -> None:
    async with served(_engine()) as s:
        call = s.channel.unary_stream("/pilotlight.v1.Inference/Generate")(b"\xff" * 64)
        await refusal(call)
        await _assert_serves(s)


async def test_a_fault_of_our_own_keeps_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the password is swordfish")

    async with served(_engine()) as s:
        with monkeypatch.context() as patch:
            patch.setattr(s.server.requests, "entered", fail)
            error = await refusal(s.stub.Generate(ids_request([1, 2, 3])))
        await _assert_serves(s)
    assert error.code() is grpc.StatusCode.INTERNAL
    assert reason_of(error) == "INTERNAL"
    assert "swordfish" not in error.details()
