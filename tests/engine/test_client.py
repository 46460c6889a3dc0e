"""The engine's client with a fake engine and a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from pilotlight.engine import client as client_module
from pilotlight.engine.client import EngineClient
from pilotlight.engine.config import EngineConfig, SupervisionPolicy
from pilotlight.engine.errors import DuplicateRequest, EngineDied, NotReady
from pilotlight.engine.messages import Abort, FinishReason, Submit
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.engine.status import EngineState
from pilotlight.engine.streams import OutputStream
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.fake_runner import tokens_alone

LIMIT_S = 20.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Bench:
    """A started client."""

    def __init__(self, engine: FakeEngine, model: str = "fake", **policy: Any) -> None:
        self.engine = engine
        self.clock = Clock()
        supervision = SupervisionPolicy(
            **{"restart_backoff_s": 0.0, "judge_interval_s": 0.0, **policy}
        )
        config = EngineConfig(model=model)
        self.client = EngineClient(
            config, supervision, launch=engine.launch, clock=self.clock, started_s=0.0
        )

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not holds():
                await asyncio.sleep(0)

    async def until_state(self, state: EngineState) -> None:
        await self.until(lambda: self.client.status.state is state)

    async def pass_time(self, seconds: float) -> None:
        """In small steps, so that the judge sees each of them."""
        for _ in range(round(seconds * 10)):
            self.clock.now_s += 0.1
            for _ in range(3):
                await asyncio.sleep(0)

    def submit(self, request_id: str = "a", n: int = 1, max_tokens: int = 6) -> OutputStream:
        sampling = SamplingParams(max_tokens=max_tokens, n=n, temperature=0.0, ignore_eos=True)
        return self.client.submit(Submit(request_id, [1, 2, 3], sampling))


@asynccontextmanager
async def started(
    engine: FakeEngine | None = None, model: str = "fake", **policy: Any
) -> AsyncIterator[Bench]:
    """Ready, or on standby where `model` is empty."""
    bench = Bench(engine or FakeEngine(), model, **policy)
    bench.client.start()
    try:
        if bench.engine.boots:
            await bench.until_state(EngineState.READY if model else EngineState.STANDBY)
        yield bench
    finally:
        await bench.client.stop()


async def read_all(stream: OutputStream) -> list[int]:
    token_ids: list[int] = []
    async with asyncio.timeout(LIMIT_S):
        while outputs := await stream.next():
            token_ids += [i for output in outputs for i in output.token_ids]
    return token_ids


# ---- streams -----------------------------------------------------------------------------------


async def test_a_stream_brings_every_token_once() -> None:
    async with started() as b:
        assert await read_all(b.submit()) == tokens_alone([1, 2, 3], 6, 200)
        assert b.client.num_live_requests == 0


async def test_what_was_not_read_comes_together() -> None:
    async with started() as b:
        stream = b.submit()
        await b.until(lambda: stream.is_ended)
        assert len(await stream.next()) == 6
        assert await stream.next() == []


async def test_an_id_can_be_used_again_only_after_its_end() -> None:
    async with started(FakeEngine(is_held=True)) as b:
        first = b.submit("a")
        with pytest.raises(DuplicateRequest):
            b.submit("a")
        first.cancel()
        assert b.submit("a") is not first


async def test_cancel_reaches_the_engine_and_is_idempotent() -> None:
    async with started(FakeEngine(is_held=True)) as b:
        stream = b.submit()
        b.engine.link.step()
        stream.cancel()
        stream.cancel()
        assert await stream.next() == []
        assert b.engine.link.core.live_request_ids() == []
        assert b.engine.link.received.count(Abort(["a"])) == 1


async def test_one_sample_can_end_alone() -> None:
    async with started(FakeEngine(is_held=True)) as b:
        stream = b.submit(n=2)
        b.engine.link.step()
        stream.cancel_sample(1)
        while b.engine.link.step():
            pass
        endings = {}
        while outputs := await stream.next():
            endings |= {o.index: o.finish_reason for o in outputs if o.finish_reason}
        assert endings == {0: FinishReason.LENGTH, 1: FinishReason.ABORTED}


async def test_abort_by_id_says_what_was_live() -> None:
    async with started(FakeEngine(is_held=True)) as b:
        stream = b.submit("a")
        assert b.client.abort(["a", "b"]) == {"a": True, "b": False}
        b.engine.link.step()
        assert [o.finish_reason for o in await stream.next()] == [FinishReason.ABORTED]
        assert b.client.abort(["a"]) == {"a": False}


async def test_what_nobody_waits_for_is_aborted() -> None:
    async with started(FakeEngine(is_held=True)) as b:
        link = b.engine.link
        lost = Submit("lost", [1, 2], SamplingParams())
        link.core.submit(lost)
        link.beat()
        await b.until(lambda: Abort(["lost"]) in link.received)
        assert link.core.live_request_ids() == []


# ---- boots -----------------------------------------------------------------------------------


async def test_nothing_is_taken_before_ready() -> None:
    async with started(FakeEngine(boots=False)) as b:
        await b.until(lambda: b.client.status.phase == "check")
        with pytest.raises(NotReady):
            b.submit()
        b.engine.link.become_ready()
        await b.until_state(EngineState.READY)
        assert await read_all(b.submit())


async def test_phases_follow_each_other_without_gaps() -> None:
    async with started() as b:
        phases = b.client.status.phases
        names = [phase.name for phase in phases]
        assert names == [
            "start_process",
            "start_engine",
            "check",
            "import_torch",
            "load_weights",
            "warm",
        ]
        for before, after in pairwise(phases):
            assert after.started_s == pytest.approx(before.started_s + before.duration_s)


async def test_a_mistake_in_the_setup_is_not_tried_again() -> None:
    async with started(FakeEngine(boots=False)) as b:
        await b.until(lambda: b.client.status.phase == "check")
        b.engine.link.fail("no such folder", is_setup=True)
        status = await b.client.wait_ended()
        assert (status.state, status.reason) == (EngineState.FAILED, "no such folder")
        assert b.client.failed_setup
        assert len(b.engine.links) == 1


async def test_a_stop_during_the_launch_does_not_wait_for_the_boot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "STOP_TIMEOUT_S", 3600.0)
    b = Bench(FakeEngine(boots=False))
    b.client.start()
    async with asyncio.timeout(LIMIT_S):
        await b.client.stop()
    assert b.client.status.state is EngineState.STOPPED


@pytest.mark.parametrize("is_between_engines", [False, True])
async def test_a_mistake_that_the_front_found_ends_the_engine_for_good(
    is_between_engines: bool,
) -> None:
    async with started(FakeEngine(boots=False), restart_backoff_s=0.01) as b:
        await b.until(lambda: b.client.status.phase == "check")
        if is_between_engines:
            b.engine.link.end("exit code 1")
            await b.until(lambda: b.client.status.num_restarts == 1)
        b.client.fail_setup("tokenizer.json is broken")
        async with asyncio.timeout(LIMIT_S):
            status = await b.client.wait_ended()
        assert (status.state, status.reason) == (EngineState.FAILED, "tokenizer.json is broken")
        assert b.client.failed_setup


# ---- deaths ----------------------------------------------------------------------------------


async def test_death_ends_streams_with_what_they_got_and_a_new_engine_serves() -> None:
    async with started(FakeEngine(is_held=True)) as b:
        stream = b.submit()
        b.engine.link.step()
        b.engine.link.step()
        b.engine.link.end("killed by SIGKILL")
        with pytest.raises(EngineDied) as death:
            await read_all(stream)
        assert death.value.num_tokens_sent == 2
        assert "SIGKILL" in str(death.value)
        await b.until(lambda: len(b.engine.links) == 2)
        await b.until_state(EngineState.READY)
        assert b.client.status.num_restarts == 1
        b.engine.link.is_held = False
        assert await read_all(b.submit()) == tokens_alone([1, 2, 3], 6, 200)


async def test_readiness_is_gone_before_streams_hear_of_the_death() -> None:
    async with started(FakeEngine(is_held=True), restart_backoff_s=3600.0) as b:
        stream = b.submit()
        b.engine.link.end("killed by SIGKILL")
        with pytest.raises(EngineDied):
            await stream.next()
        assert b.client.status.state is EngineState.STARTING
        with pytest.raises(NotReady):
            b.submit("b")


async def test_with_exit_there_is_no_second_engine() -> None:
    async with started(restarts=False) as b:
        b.engine.link.end("killed by SIGKILL")
        status = await b.client.wait_ended()
        assert (status.state, status.reason) == (EngineState.FAILED, "killed by SIGKILL")
        assert len(b.engine.links) == 1


async def test_restarts_in_a_row_are_bounded() -> None:
    async with started(max_restarts=2) as b:
        for count in (1, 2, 3):
            await b.until(lambda count=count: len(b.engine.links) == count)
            b.engine.link.end("exit code 1")
        status = await b.client.wait_ended()
        assert (status.state, status.num_restarts) == (EngineState.FAILED, 2)


# ---- stalls ----------------------------------------------------------------------------------


async def test_a_silent_engine_is_not_ready_and_is_again_when_it_speaks() -> None:
    async with started(heartbeat_timeout_s=1.0) as b:
        await b.pass_time(1.5)
        assert b.client.status.state is EngineState.STALLED
        assert "no heartbeat" in b.client.status.reason
        with pytest.raises(NotReady):
            b.submit()
        b.engine.link.beat()
        await b.until_state(EngineState.READY)
        assert b.client.status.reason == ""


async def test_an_engine_that_stays_stalled_is_killed_and_replaced() -> None:
    async with started(FakeEngine(is_held=True), heartbeat_timeout_s=1.0, stall_kill_s=2.0) as b:
        stream = b.submit()
        await b.pass_time(3.5)
        with pytest.raises(EngineDied, match="no heartbeat"):
            await stream.next()
        await b.until(lambda: len(b.engine.links) == 2)
        await b.until_state(EngineState.READY)


async def test_a_heartbeat_shows_the_engines_numbers() -> None:
    async with started(FakeEngine(is_held=True)) as b:
        b.submit()
        b.engine.link.step()
        b.engine.link.beat()
        await b.until(lambda: b.client.status.statistics.num_running == 1)
