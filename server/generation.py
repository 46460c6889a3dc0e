"""The life of one request, from the door to its last chunk. Knows the engine's client and text.

    door: state, limits, admission -> tokenise -> submit -> chunks as they come -> usage, timings

However it ends (finished, cancelled, refused, engine dead), its places are given back and the
engine forgets it: that is the `finally` of `chunks`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from ..engine.client import EngineClient
from ..engine.errors import InvalidField, NotReady, RequestCancelled, RowFailed
from ..engine.messages import FinishReason, ModelFacts, Output, Submit
from ..engine.sampling_params import SamplingParams
from ..engine.streams import OutputStream
from ..proto import inference_pb2 as pb
from .admission import Admission, Place, estimated_tokens
from .lifecycle import Lifecycle
from .metrics import Metrics
from .model_text import ModelText
from .requests import RequestTable
from .samples import Sample
from .validation import (
    check_chat,
    check_ids,
    check_model_name,
    check_prompt_ids,
    check_prompt_text,
    sampling_params,
    text_options,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Services:
    """Everything a request needs; one for the whole server."""

    engine: EngineClient
    lifecycle: Lifecycle
    admission: Admission
    requests: RequestTable
    metrics: Metrics
    text: ModelText


@dataclass(slots=True)
class Times:
    """time.monotonic() of a request's moments; 0 until they come."""

    arrived_s: float
    tokenized_s: float = 0.0
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    newest_token_s: float = 0.0

    def timings(self, now_s: float, num_tokens: int) -> pb.Timings:
        decode_s = now_s - self.first_token_s if self.first_token_s else 0.0
        return pb.Timings(
            tokenized_s=self._since_arrival(self.tokenized_s),
            scheduled_s=self._since_arrival(self.scheduled_s),
            first_token_s=self._since_arrival(self.first_token_s),
            total_s=now_s - self.arrived_s,
            output_tokens_per_s=(num_tokens - 1) / decode_s if decode_s > 0 else 0.0,
        )

    def _since_arrival(self, at_s: float) -> float:
        return max(0.0, at_s - self.arrived_s) if at_s else 0.0


class Generation:
    """One Generate or Complete. `time_left_s`: the caller's deadline, None without one."""

    def __init__(
        self, services: Services, request: pb.GenerateRequest, time_left_s: float | None
    ) -> None:
        self._services = services
        self._request = request
        self._time_left_s = time_left_s
        self._times = Times(time.monotonic())
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._samples: list[Sample] = []
        self._edition = 0
        self.request_id = request.request_id or f"pl-{secrets.token_hex(8)}"
        self.seed = 0
        self.outcome = "cancelled"
        """For the metrics: how it ended; cancelled unless something else happens."""

    async def chunks(self) -> AsyncIterator[pb.GenerateChunk]:
        """Raises RequestError, CapacityError or EngineError; each maps to a status."""
        services = self._services
        facts = services.lifecycle.check_open()
        params = self._checked(facts)
        with services.requests.entered(self.request_id):
            place = self._admitted(params, facts)
            stream: OutputStream | None = None
            try:
                try:
                    prompt_ids = await self._prompt_ids(facts)
                except RequestCancelled:
                    for chunk in self._aborted_early():
                        yield chunk
                    return
                self._check_same_model()
                services.admission.correct(place, len(prompt_ids))
                stream = services.engine.submit(self._submit(prompt_ids, params))
                async for chunk in self._answer(stream, place):
                    yield chunk
            finally:
                if stream is not None:
                    stream.cancel()
                services.admission.release(place)

    # ---- at the door -------------------------------------------------------------------------

    def _checked(self, facts: ModelFacts) -> SamplingParams:
        request, text = self._request, self._services.text
        self._edition = text.edition
        check_model_name(request.model, text.name)
        check_ids(request)
        params = sampling_params(request, facts, text.defaults, secrets.randbits(64))
        options = text_options(request)
        if options.stop_strings:
            # Without text there is nothing to find them in.
            text.encoder("stop.strings", "use stop.token_ids")
        self.seed = params.seed
        self._samples = [
            Sample(self.request_id, i, options, text.tokenizer) for i in range(params.n)
        ]
        return params

    def _check_same_model(self) -> None:
        """Token ids mean nothing to another model than the one whose tokenizer made them."""
        if self._services.text.edition != self._edition:
            raise NotReady("the model was unloaded while the prompt was tokenised")

    def _admitted(self, params: SamplingParams, facts: ModelFacts) -> Place:
        estimate = self._estimated_prompt_tokens(facts)
        return self._services.admission.admit(params.n, estimate, self._time_left_s)

    def _estimated_prompt_tokens(self, facts: ModelFacts) -> int:
        """Refuses what can be refused by its size alone; never tokenises."""
        request = self._request
        match request.WhichOneof("prompt"):
            case "token_ids":
                check_prompt_ids(request.token_ids.ids, facts)
                return len(request.token_ids.ids)
            case "text":
                max_chars = self._services.text.encoder().max_chars(facts.context_len)
                check_prompt_text(request.text, max_chars, facts)
                return estimated_tokens(len(request.text.encode()))
            case "chat":
                self._services.text.encoder()
                check_chat(request.chat)
                num_bytes = sum(len(m.content.encode()) for m in request.chat.messages)
                return estimated_tokens(num_bytes)
        raise InvalidField("prompt", "absent", "one of text, token_ids and chat must be set")

    # ---- tokens ------------------------------------------------------------------------------

    async def _prompt_ids(self, facts: ModelFacts) -> list[int]:
        request, requests = self._request, self._services.requests
        if request.WhichOneof("prompt") == "token_ids":
            prompt_ids = list(request.token_ids.ids)
        else:
            work = requests.in_thread(partial(encode_prompt, request, self._services.text, facts))
            prompt_ids = await requests.abortable(self.request_id, work)
            check_prompt_ids(prompt_ids, facts)
        self._times.tokenized_s = time.monotonic()
        self._num_prompt_tokens = len(prompt_ids)
        return prompt_ids

    def _submit(self, prompt_ids: list[int], params: SamplingParams) -> Submit:
        return Submit(self.request_id, prompt_ids, params, self._request.cache_salt)

    # ---- the answer --------------------------------------------------------------------------

    async def _answer(self, stream: OutputStream, place: Place) -> AsyncIterator[pb.GenerateChunk]:
        while outputs := await stream.next():
            self._note_outputs(outputs)
            if self._times.first_token_s:
                self._services.admission.start(place)
            for index, group in groupby(_by_index(outputs), key=lambda output: output.index):
                chunk = self._samples[index].chunk(list(group))
                if chunk is not None:
                    self._end_sample(index, stream)
                    yield self._completed(chunk)
            if self._is_over:
                return

    @property
    def _is_over(self) -> bool:
        return all(sample.is_ended for sample in self._samples)

    def _end_sample(self, index: int, stream: OutputStream) -> None:
        """A stop string ends its own sample only; the engine learns of it here."""
        if self._samples[index].stopped_itself() and not self._is_over:
            stream.cancel_sample(index)

    def _completed(self, chunk: pb.GenerateChunk) -> pb.GenerateChunk:
        """The last chunk of all carries usage and timings. Raises RowFailed if nothing came out."""
        if not self._is_over:
            return chunk
        if all(sample.error for sample in self._samples):
            raise RowFailed(self._samples[0].error)
        return self._with_usage(chunk)

    def _with_usage(self, chunk: pb.GenerateChunk) -> pb.GenerateChunk:
        now_s = time.monotonic()
        num_output_tokens = sum(sample.num_tokens for sample in self._samples)
        chunk.usage.prompt_tokens = self._num_prompt_tokens
        chunk.usage.output_tokens = num_output_tokens
        chunk.usage.cached_prompt_tokens = self._num_cached_tokens
        chunk.timings.CopyFrom(self._times.timings(now_s, num_output_tokens))
        self.outcome = pb.FinishReason.Name(chunk.finish_reason).removeprefix("FINISH_REASON_")
        metrics = self._services.metrics
        metrics.end_to_end.observe(now_s - self._times.arrived_s)
        metrics.prompt_tokens.inc(self._num_prompt_tokens)
        return chunk

    def _aborted_early(self) -> list[pb.GenerateChunk]:
        """By Abort, before the engine had it: every sample ends at once."""
        aborted = Output(self.request_id, 0, [], FinishReason.ABORTED)
        chunks = [sample.chunk([aborted]) for sample in self._samples]
        *others, last = [chunk for chunk in chunks if chunk is not None]
        return [*others, self._with_usage(last)]

    def _note_outputs(self, outputs: list[Output]) -> None:
        now_s, times, metrics = time.monotonic(), self._times, self._services.metrics
        num_tokens = sum(len(output.token_ids) for output in outputs)
        metrics.output_tokens.inc(num_tokens)
        first = outputs[0]
        if first.first_scheduled_s and not times.scheduled_s:
            times.scheduled_s = first.first_scheduled_s
            self._num_cached_tokens = first.num_cached_tokens
            metrics.queue_time.observe(max(0.0, times.scheduled_s - times.arrived_s))
        if num_tokens and not times.first_token_s:
            times.first_token_s = now_s
            metrics.time_to_first_token.observe(now_s - times.arrived_s)
            self._services.lifecycle.sent_token()
        elif num_tokens:
            num_steps = -(-num_tokens // len(self._samples))
            metrics.inter_token.observe((now_s - times.newest_token_s) / num_steps)
        times.newest_token_s = now_s


def encode_prompt(request: pb.GenerateRequest, text: ModelText, facts: ModelFacts) -> list[int]:
    """On a text thread. A rendered template brings its own special tokens."""
    encoder = text.encoder()
    if request.WhichOneof("prompt") == "chat":
        prompt = text.chat_prompt(request.chat)
        check_prompt_text(prompt, encoder.max_chars(facts.context_len), facts)
        return encoder.encode(prompt, add_special_tokens=False)
    return encoder.encode(request.text, add_special_tokens=True)


def _by_index(outputs: list[Output]) -> list[Output]:
    """Stable, so that each sample's outputs stay in order."""
    return sorted(outputs, key=lambda output: output.index) if len(outputs) > 1 else outputs
