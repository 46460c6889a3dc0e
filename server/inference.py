"""The methods of pilotlight.v1.Inference. Knows gRPC; everything else is asked of others.

A handler that is cancelled (client gone, deadline over) re-raises: grpc.aio leaks the call's
operations otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from ..engine.errors import DeadlineExpired
from ..proto import inference_pb2 as pb
from ..proto import inference_pb2_grpc as pb_grpc
from .config import ServeConfig
from .generation import Generation, Services
from .limits import check_size
from .refusals import Context, abort, refusing
from .timeline import eta_s
from .validation import check_token_ids

WATCH_INTERVAL_S = 0.25
"""WatchStartup speaks at least this often: a phase without bytes shows that time passes."""

STARTUP_ENDS = (
    pb.SERVER_STATE_READY,
    pb.SERVER_STATE_FAILED,
    pb.SERVER_STATE_STOPPED,
    pb.SERVER_STATE_DRAINING,
)

RESTING = (pb.SERVER_STATE_STANDBY, pb.SERVER_STATE_SLEEPING)
"""Nothing moves until somebody orders a model: what there is to say was said once."""


class Inference(pb_grpc.InferenceServicer):
    """One per server."""

    def __init__(self, services: Services, config: ServeConfig) -> None:
        self._services = services
        self._config = config

    # ---- generation --------------------------------------------------------------------------

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateChunk]:
        generation = Generation(self._services, request, context.time_remaining())
        async with self._answering(context, generation):
            async for chunk in generation.chunks():
                yield chunk

    async def Complete(self, request: pb.GenerateRequest, context: Context) -> pb.CompleteResponse:
        generation = Generation(self._services, request, context.time_remaining())
        async with self._answering(context, generation):
            response = pb.CompleteResponse(request_id=generation.request_id)
            completions: dict[int, pb.Completion] = {}
            async for chunk in generation.chunks():
                _add(chunk, completions.setdefault(chunk.index, pb.Completion(index=chunk.index)))
                if chunk.HasField("usage"):
                    response.usage.CopyFrom(chunk.usage)
                    response.timings.CopyFrom(chunk.timings)
            response.completions.extend(completions[index] for index in sorted(completions))
            response.seed = generation.seed
            return response
        raise AssertionError("abort always raises")

    @asynccontextmanager
    async def _answering(self, context: Context, generation: Generation) -> AsyncIterator[None]:
        """Turns errors into statuses and counts the outcome, whatever it was."""
        try:
            async with asyncio.timeout(context.time_remaining()):
                yield
        except TimeoutError:
            generation.outcome = "deadline"
            await abort(context, DeadlineExpired("the deadline passed before the last token"))
        except Exception as error:
            generation.outcome = type(error).__name__
            await abort(context, error)
        finally:
            self._services.metrics.requests.labels(generation.outcome.lower()).inc()

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        async with refusing(context):
            check_size("request_ids", len(request.request_ids))
        in_front = {i for i in request.request_ids if self._services.requests.abort(i)}
        in_engine = self._services.engine.abort(list(request.request_ids))
        results = [
            pb.AbortResponse.Result(request_id=i, found=i in in_front or in_engine[i])
            for i in request.request_ids
        ]
        return pb.AbortResponse(results=results)

    # ---- text --------------------------------------------------------------------------------

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        async with refusing(context):
            work = partial(self._tokenized, request)
            return pb.TokenizeResponse(token_ids=await self._services.requests.in_thread(work))
        raise AssertionError("abort always raises")

    def _tokenized(self, request: pb.TokenizeRequest) -> list[int]:
        text = self._services.text
        is_chat = request.WhichOneof("input") == "chat"
        prompt = text.chat_prompt(request.chat) if is_chat else request.text
        adds = request.add_special_tokens if request.HasField("add_special_tokens") else True
        return text.encoder().encode(prompt, adds and not is_chat)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        async with refusing(context):
            work = partial(self._detokenized, request)
            return pb.DetokenizeResponse(text=await self._services.requests.in_thread(work))
        raise AssertionError("abort always raises")

    def _detokenized(self, request: pb.DetokenizeRequest) -> str:
        facts = self._services.engine.status.facts
        check_token_ids("token_ids", request.token_ids, facts.vocab_size if facts else 1 << 31)
        skips = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        return self._services.text.encoder().decode(list(request.token_ids), skips)

    # ---- facts, in every state ---------------------------------------------------------------

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        info = pb.GetModelInfoResponse(
            name=self._services.text.name,
            has_chat_template=self._services.text.chat_template is not None,
        )
        facts = self._services.engine.status.facts
        if facts is not None:
            info.architecture = facts.architecture
            info.context_len = facts.context_len
            info.vocab_size = facts.vocab_size
            info.num_parameters = facts.num_parameters
            info.weight_bytes = facts.weight_bytes
            info.dtype = facts.dtype
            info.kv_cache_dtype = facts.kv_cache_dtype
            info.eos_token_ids.extend(facts.eos_token_ids)
        return info

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        lifecycle, status = self._services.lifecycle, self._services.engine.status
        info = pb.GetServerInfoResponse(
            version=package_version(),
            state=lifecycle.state,
            state_reason=status.reason,
            uptime_s=lifecycle.elapsed_s,
            max_num_seqs=self._config.max_num_seqs,
            max_batched_tokens=self._config.max_batched_tokens,
            num_engine_restarts=status.num_restarts,
        )
        if status.facts is not None:
            info.device = status.facts.device
            info.kv_cache_bytes = status.facts.kv_cache_bytes
            info.block_size = status.facts.block_size
            info.num_blocks = status.facts.num_blocks
            info.kernels.update(status.facts.kernels)
        return info

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        statistics = self._services.engine.status.statistics
        admission = self._services.admission
        num_blocks = statistics.num_blocks
        return pb.GetLoadResponse(
            num_running=statistics.num_running,
            num_waiting=statistics.num_waiting,
            kv_cache_use=statistics.num_used_blocks / num_blocks if num_blocks else 0.0,
            num_admitted_requests=admission.num_requests,
            max_admitted_requests=admission.max_requests,
            num_admitted_prompt_tokens=admission.num_prompt_tokens,
            max_admitted_prompt_tokens=admission.max_prompt_tokens,
            heartbeat_age_s=self._services.engine.heartbeat_age_s,
        )

    async def WatchStartup(
        self, request: pb.WatchStartupRequest, context: Context
    ) -> AsyncIterator[pb.StartupStatus]:
        changes = self._services.engine.status_changes()
        await anext(changes)
        newer = asyncio.ensure_future(anext(changes))
        try:
            while (startup := self._startup()).state not in STARTUP_ENDS:
                yield startup
                timeout_s = None if startup.state in RESTING else WATCH_INTERVAL_S
                await asyncio.wait({newer}, timeout=timeout_s)
                if newer.done():
                    newer = asyncio.ensure_future(anext(changes))
            yield startup
        finally:
            newer.cancel()
            with suppress(asyncio.CancelledError):
                await newer

    def _startup(self) -> pb.StartupStatus:
        status = self._services.engine.status
        elapsed_s = self._services.lifecycle.elapsed_s
        return pb.StartupStatus(
            state=self._services.lifecycle.state,
            phase=status.phase,
            bytes_done=status.bytes_done,
            bytes_total=status.bytes_total,
            elapsed_s=elapsed_s,
            since_ask_s=elapsed_s - status.asked_s,
            eta_s=eta_s(status, elapsed_s),
            detail=status.detail or status.reason,
            phases=[
                pb.Phase(name=p.name, started_s=p.started_s, duration_s=p.duration_s)
                for p in status.phases
            ],
        )


def _add(chunk: pb.GenerateChunk, completion: pb.Completion) -> None:
    completion.text += chunk.text
    completion.token_ids.extend(chunk.token_ids)
    completion.logprobs.extend(chunk.logprobs)
    completion.finish_reason = chunk.finish_reason
    match chunk.WhichOneof("stopped_by"):
        case "stop_string":
            completion.stop_string = chunk.stop_string
        case "stop_token_id":
            completion.stop_token_id = chunk.stop_token_id


def package_version() -> str:
    try:
        return version("pilotlight")
    except PackageNotFoundError:
        return "0+uninstalled"
