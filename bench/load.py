"""Sends planned requests and notes when their tokens come.

An open loop sends each request when it is due, whatever became of those before, and measures from
that moment: a client or server that falls behind shows it. A closed loop sends a request when one
before has ended. Knows the wire contract; computes no statistics.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Iterator

import grpc
import grpc.aio
import numpy as np

from ..proto import inference_pb2 as pb
from ..proto import inference_pb2_grpc as pb_grpc
from .arrivals import Planned
from .latency import OK, Outcome
from .openai_target import OpenAiStub, TargetError

REFUSED_PAUSE_S = 0.05
"""A closed loop's place rests this long after an error, so that it does not spin on it."""


class Prompts:
    """Requests of random token ids, greedy, that end after exactly the planned tokens."""

    def __init__(self, vocab_size: int, shared_prefix_len: int, seed: int) -> None:
        self._vocab_size = vocab_size
        self._source = np.random.default_rng(seed)
        self._prefix = self._ids(shared_prefix_len)

    def request(self, planned: Planned) -> pb.GenerateRequest:
        request = pb.GenerateRequest()
        shared = self._prefix[: planned.input_len]
        request.token_ids.ids.extend(shared + self._ids(planned.input_len - len(shared)))
        request.sampling.temperature = 0.0
        request.stop.max_tokens = planned.output_len
        request.stop.ignore_eos = True
        return request

    def _ids(self, count: int) -> list[int]:
        ids: list[int] = self._source.integers(self._vocab_size, size=count).tolist()
        return ids


class Load:
    """One run. `outcomes` holds every request that was sent, ended or not, in that order."""

    def __init__(
        self,
        stub: pb_grpc.InferenceStub | OpenAiStub,
        prompts: Prompts,
        *,
        deadline_s: float | None = None,
        duration_s: float | None = None,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.began_s = time.perf_counter()
        self._stub = stub
        self._prompts = prompts
        self._deadline_s = deadline_s
        self._duration_s = math.inf if duration_s is None else duration_s

    async def run(self, plans: Iterable[Planned], concurrency: int | None) -> None:
        """To the last answer, however it ends. When cancelled, requests under way are too."""
        self.began_s = time.perf_counter()
        if concurrency is None:
            await self._open_loop(plans)
        else:
            await self._closed_loop(iter(plans), concurrency)

    @property
    def num_ended(self) -> int:
        return sum(outcome.ended_s > 0 for outcome in self.outcomes)

    async def _open_loop(self, plans: Iterable[Planned]) -> None:
        async with asyncio.TaskGroup() as group:
            for planned in plans:
                if planned.at_s >= self._duration_s:
                    return
                request = self._prompts.request(planned)
                due_s = self.began_s + planned.at_s
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                group.create_task(self._send(request, planned, due_s))

    async def _closed_loop(self, plans: Iterator[Planned], concurrency: int) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._one_place(plans))

    async def _one_place(self, plans: Iterator[Planned]) -> None:
        """Places share `plans`: each takes the next when it is free."""
        for planned in plans:
            request = self._prompts.request(planned)
            due_s = time.perf_counter()
            if due_s - self.began_s >= self._duration_s:
                return
            outcome = await self._send(request, planned, due_s)
            if outcome.code != OK:
                await asyncio.sleep(REFUSED_PAUSE_S)

    async def _send(self, request: pb.GenerateRequest, planned: Planned, due_s: float) -> Outcome:
        outcome = Outcome(planned, due_s, time.perf_counter())
        self.outcomes.append(outcome)
        try:
            async for chunk in self._stub.Generate(request, timeout=self._deadline_s):
                outcome.hear(len(chunk.token_ids), time.perf_counter())
            outcome.end(time.perf_counter())
        except grpc.aio.AioRpcError as error:
            outcome.end(time.perf_counter(), error.code().name, error.details() or "")
        except TargetError as error:
            outcome.end(time.perf_counter(), error.code, str(error))
        except asyncio.CancelledError:
            outcome.end(time.perf_counter(), "CANCELLED", "ended by the client")
            raise
        return outcome
