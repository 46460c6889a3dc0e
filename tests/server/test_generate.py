"""Generate and Complete over real gRPC, with a fake engine behind: what is asked and what comes."""

from __future__ import annotations

from pathlib import Path

import grpc.aio
import pytest
from pilotlight.engine.messages import FinishReason, TopLogprob
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.proto import inference_pb2 as pb
from pilotlight.proto import inference_pb2_grpc as pb_grpc
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.fake_runner import tokens_alone
from pilotlight.tests.served import ids_request, served
from pilotlight.tests.server.wire import (
    VOCAB_SIZE,
    chat_request,
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

PROMPT = "def fibonacci(n):"


async def test_streams_the_tokens_and_ends_with_usage() -> None:
    async with served() as s:
        chunks = await read(s.stub.Generate(ids_request([1, 2, 3], 8)))
    assert ids_of(chunks) == tokens_alone([1, 2, 3], 8, 200)
    assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert chunks[-1].usage == pb.Usage(prompt_tokens=3, output_tokens=8)
    assert not any(c.HasField("usage") or c.HasField("timings") for c in chunks[:-1])
    assert not any(c.finish_reason for c in chunks[:-1])


async def test_each_chunk_counts_the_tokens_so_far() -> None:
    async with served() as s:
        chunks = await read(s.stub.Generate(ids_request([1, 2, 3], 8)))
    num_tokens = 0
    for chunk in chunks:
        num_tokens += len(chunk.token_ids)
        assert chunk.num_output_tokens == num_tokens
    assert num_tokens == 8


async def test_text_is_tokenised_and_comes_back_as_text() -> None:
    prompt_ids = tokenizer().encode(PROMPT, add_special_tokens=True)
    expected = tokens_alone(prompt_ids, 40, VOCAB_SIZE)
    async with served(text_engine()) as s:
        chunks = await read(s.stub.Generate(text_request(PROMPT, 40)))
    assert ids_of(chunks) == expected
    assert text_of(chunks) == tokenizer().decode(expected, skip_special_tokens=True)
    assert chunks[-1].usage.prompt_tokens == len(prompt_ids)


@pytest.mark.parametrize(
    ("opens", "end"),
    [(None, "<|im_start|>assistant\n"), (True, "<|im_start|>assistant\n"), (False, "")],
)
async def test_chat_is_written_as_the_models_template_says(opens: bool | None, end: str) -> None:
    request = chat_request("Hello", "Again", request_id="a")
    if opens is not None:
        request.chat.add_generation_prompt = opens
    async with served(text_engine()) as s:
        await read(s.stub.Generate(request))
        prompt_ids = (await submitted(s, "a")).prompt_ids
    turns = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>user\nAgain<|im_end|>\n"
    assert prompt_ids == tokenizer().encode(turns + end, add_special_tokens=False)
    assert prompt_ids.count(1) == 2 + bool(end), "<|im_start|> is one token, not its letters"


# ---- samples -----------------------------------------------------------------------------------


async def test_every_sample_comes_whole_and_usage_counts_them_all() -> None:
    request = ids_request([1, 2, 3], 6)
    request.sampling.n = 3
    async with served() as s:
        chunks = await read(s.stub.Generate(request))
    for index in range(3):
        assert ids_of(chunks, index) == tokens_alone([1, 2, 3], 6, 200)
        endings = [c.finish_reason for c in chunks if c.index == index and c.finish_reason]
        assert endings == [pb.FINISH_REASON_LENGTH]
    assert [c.HasField("usage") for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage == pb.Usage(prompt_tokens=3, output_tokens=18)


async def test_usage_waits_for_the_sample_that_ends_last() -> None:
    request = ids_request([1, 2, 3], request_id="a")
    request.sampling.n = 2
    async with served(FakeEngine(is_held=True)) as s:
        call = s.stub.Generate(request)
        await submitted(s, "a")
        say(s, gained("a", [5], 1, FinishReason.LENGTH))
        first = await call.read()
        say(s, gained("a", [6], 0, FinishReason.LENGTH))
        last = await call.read()
    assert (first.index, first.finish_reason) == (1, pb.FINISH_REASON_LENGTH)
    assert not first.HasField("usage")
    assert (last.index, last.usage.output_tokens) == (0, 2)


# ---- Complete ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stops", [[], ["e"]])
async def test_complete_is_the_stream_put_together(n: int, stops: list[str]) -> None:
    request = text_request(PROMPT, 20)
    request.sampling.n = n
    request.stop.strings.extend(stops)
    async with served(text_engine()) as s:
        chunks = await read(s.stub.Generate(request))
        response = await s.stub.Complete(request)
    assert [completion.index for completion in response.completions] == list(range(n))
    for completion in response.completions:
        mine = [chunk for chunk in chunks if chunk.index == completion.index]
        assert completion.text == text_of(mine, completion.index)
        assert list(completion.token_ids) == ids_of(mine, completion.index)
        assert list(completion.logprobs) == [entry for c in mine for entry in c.logprobs]
        assert completion.finish_reason == mine[-1].finish_reason
        assert completion.stop_string == mine[-1].stop_string
    assert response.usage.output_tokens == chunks[-1].usage.output_tokens
    assert response.HasField("timings")


# ---- names and seeds ---------------------------------------------------------------------------


async def test_the_request_id_is_in_every_chunk() -> None:
    async with served() as s:
        chunks = await read(s.stub.Generate(ids_request([1, 2], 4, request_id="mine")))
        response = await s.stub.Complete(ids_request([1, 2], 4, request_id="mine"))
    assert {chunk.request_id for chunk in chunks} == {"mine"}
    assert response.request_id == "mine"


async def test_a_request_without_id_gets_one_of_its_own() -> None:
    async with served() as s:
        ids = [
            {chunk.request_id for chunk in await read(s.stub.Generate(ids_request([1, 2], 4)))}
            for _ in range(2)
        ]
    assert [len(of_one) for of_one in ids] == [1, 1]
    assert len(ids[0] | ids[1]) == 2
    assert all(ids[0] | ids[1])


async def test_the_seed_in_use_is_told_given_or_drawn() -> None:
    given = ids_request([1, 2], 2, request_id="given")
    given.sampling.seed = 2**64 - 1
    async with served() as s:
        assert (await s.stub.Complete(given)).seed == 2**64 - 1
        assert (await submitted(s, "given")).sampling.seed == 2**64 - 1
        drawn = await s.stub.Complete(ids_request([1, 2], 2, request_id="drawn"))
        other = await s.stub.Complete(ids_request([1, 2], 2))
        assert drawn.seed == (await submitted(s, "drawn")).sampling.seed
    assert drawn.seed != other.seed


async def test_the_served_model_may_be_asked_for_by_name() -> None:
    async with served(model_name="pilot") as s:
        assert await s.stub.Complete(ids_request([1, 2], 2, model="pilot"))


# ---- sampling ----------------------------------------------------------------------------------


async def test_every_sampling_field_reaches_the_engine() -> None:
    request = pb.GenerateRequest(request_id="a", cache_salt="pepper")
    request.token_ids.ids.extend([1, 2, 3])
    request.sampling.MergeFrom(
        pb.SamplingOptions(
            temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, repetition_penalty=1.5,
            presence_penalty=-1.0, frequency_penalty=2.0, logit_bias={3: -5.0, 0: 5.0}, seed=11,
            n=2,
        )
    )  # fmt: skip
    stop = pb.StopOptions(max_tokens=9, min_tokens=2, token_ids=[4, 5], ignore_eos=True)
    request.stop.MergeFrom(stop)
    request.output.logprobs = 3
    async with served() as s:
        await s.stub.Complete(request)
        submit = await submitted(s, "a")
    assert submit.cache_salt == "pepper"
    assert submit.sampling == SamplingParams(
        max_tokens=9, min_tokens=2, temperature=0.5, top_k=7, top_p=0.25, min_p=0.125,
        repetition_penalty=1.5, presence_penalty=-1.0, frequency_penalty=2.0,
        logit_bias={3: -5.0, 0: 5.0}, seed=11, n=2, num_logprobs=3, stop_token_ids=(4, 5),
        ignore_eos=True,
    )  # fmt: skip


def _plain(request_id: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(request_id=request_id, token_ids=pb.TokenIds(ids=[1, 2, 3]))


async def test_absent_fields_mean_defaults_and_never_zero() -> None:
    async with served() as s:
        seed = (await s.stub.Complete(_plain("a"))).seed
        sampling = (await submitted(s, "a")).sampling
    assert sampling == SamplingParams(max_tokens=256, temperature=1.0, seed=seed)


async def test_the_models_authors_may_recommend_other_defaults(tmp_path: Path) -> None:
    recommended = '{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": null}'
    (tmp_path / "generation_config.json").write_text(recommended)
    async with served(model=str(tmp_path)) as s:
        await s.stub.Complete(_plain("a"))
        sampling = (await submitted(s, "a")).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 20, 0.95)
    assert sampling.repetition_penalty == 1.0


@pytest.mark.parametrize("nonsense", ['{"temperature": NaN}', '{"top_k": -1}', "[]", "{"])
async def test_recommendations_that_break_the_limits_are_not_followed(
    nonsense: str, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(nonsense)
    async with served(model=str(tmp_path)) as s:
        await s.stub.Complete(_plain("a"))
        sampling = (await submitted(s, "a")).sampling
    assert (sampling.temperature, sampling.top_k) == (1.0, 0)


async def test_logprobs_carry_the_chosen_token_and_the_likeliest() -> None:
    request = ids_request([1, 2], request_id="a")
    request.output.logprobs = 2
    top = [TopLogprob(7, -0.5), TopLogprob(9, -1.5)]
    async with served(FakeEngine(is_held=True)) as s:
        call = s.stub.Generate(request)
        assert (await submitted(s, "a")).sampling.num_logprobs == 2
        say(s, gained("a", [9], finish_reason=FinishReason.LENGTH, top=top))
        [chunk] = await read(call)
    [entry] = chunk.logprobs
    assert (entry.token_id, entry.logprob) == (9, -1.0)
    assert [(other.token_id, other.logprob) for other in entry.top] == [(7, -0.5), (9, -1.5)]


async def test_no_logprobs_where_none_were_asked_for() -> None:
    async with served(FakeEngine(is_held=True)) as s:
        call = s.stub.Generate(ids_request([1, 2], request_id="a"))
        assert (await submitted(s, "a")).sampling.num_logprobs == -1
        say(s, gained("a", [9], finish_reason=FinishReason.LENGTH))
        [chunk] = await read(call)
    assert not chunk.logprobs


async def test_a_full_context_ends_the_sample() -> None:
    async with served(FakeEngine(context_len=16)) as s:
        response = await s.stub.Complete(ids_request(list(range(10)), 16))
    [completion] = response.completions
    assert completion.finish_reason == pb.FINISH_REASON_LENGTH
    assert len(completion.token_ids) == 6


# ---- times, caches and slow readers --------------------------------------------------------------


async def test_timings_follow_the_requests_life() -> None:
    async with served(text_engine()) as s:
        timings = (await s.stub.Complete(text_request(PROMPT, 4))).timings
    assert 0.0 < timings.tokenized_s <= timings.scheduled_s <= timings.first_token_s
    assert timings.first_token_s <= timings.total_s
    assert timings.output_tokens_per_s > 0.0


@pytest.mark.parametrize(("salt", "num_cached"), [("", 8), ("other", 0)])
async def test_usage_says_what_the_prefix_cache_held(salt: str, num_cached: int) -> None:
    prompt = list(range(10))
    async with served(FakeEngine(block_size=4)) as s:
        first = await s.stub.Complete(ids_request(prompt))
        again = await s.stub.Complete(ids_request(prompt, cache_salt=salt))
    assert first.usage.cached_prompt_tokens == 0
    assert again.usage.cached_prompt_tokens == num_cached
    assert again.completions[0].token_ids == first.completions[0].token_ids


async def test_a_slow_reader_gets_fewer_and_larger_chunks_and_costs_the_engine_nothing() -> None:
    num_tokens = 400
    tiny_window = (("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0))
    async with served(FakeEngine(context_len=512)) as s:
        target = f"127.0.0.1:{s.server.port}"
        async with grpc.aio.insecure_channel(target, options=tiny_window) as channel:
            request = ids_request([1, 2, 3], num_tokens, request_id="a")
            call = pb_grpc.InferenceStub(channel).Generate(request)
            await submitted(s, "a")
            await s.until(lambda: not s.engine.link.core.has_work)
            chunks = await read(call)
    assert ids_of(chunks) == tokens_alone([1, 2, 3], num_tokens, 200)
    assert len(chunks) < num_tokens / 10
