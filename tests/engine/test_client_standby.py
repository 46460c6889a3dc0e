"""The engine's client while models come and go: a fake engine, and a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest
from pilotlight.engine.client import UNLOAD_TIMEOUT_S, EngineClient
from pilotlight.engine.config import EngineConfig
from pilotlight.engine.errors import EngineDied, NotReady, SetupError, WrongState
from pilotlight.engine.messages import Boot, FinishReason, Unload
from pilotlight.engine.status import EngineState
from pilotlight.tests.engine.test_client import LIMIT_S, Bench, read_all, started
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.fake_runner import tokens_alone

MODEL, OTHER = EngineConfig(model="a", max_model_len=64), EngineConfig(model="b")
EXPECTED = tokens_alone([1, 2, 3], 6, 200)


def _booted(bench: Bench) -> list[str]:
    """The models that the newest engine was told to boot, in order."""
    return [m.config.model for m in bench.engine.link.received if isinstance(m, Boot)]


async def _within(work: Awaitable[None]) -> None:
    async with asyncio.timeout(LIMIT_S):
        await work


async def _begun(bench: Bench, work: Awaitable[None]) -> asyncio.Future[None]:
    """An order under way: the engine has heard of it."""
    num_heard = len(bench.engine.link.received)
    task = asyncio.ensure_future(work)
    await bench.until(lambda: len(bench.engine.link.received) > num_heard)
    return task


# ---- standby and back --------------------------------------------------------------------------


async def test_an_engine_without_a_model_stands_by_and_takes_nothing() -> None:
    async with started(model="") as b:
        assert [phase.name for phase in b.client.status.phases] == [
            "start_process", "start_engine", "import_torch",
        ]  # fmt: skip
        assert b.client.status.facts is None
        with pytest.raises(NotReady, match="standby"):
            b.submit()


async def test_a_load_brings_a_model_and_a_timeline_of_its_own() -> None:
    engine = FakeEngine()
    async with started(engine, model="") as b:
        engine.clock = b.clock
        b.clock.now_s = 100.0
        await _within(b.client.load(MODEL))
        status = b.client.status
        assert status.state is EngineState.READY
        assert engine.link.received[-1] == Boot(MODEL)
        assert await read_all(b.submit()) == EXPECTED
    names = [phase.name for phase in status.phases]
    assert names == ["accept", "check", "import_torch", "load_weights", "warm"]
    assert (status.asked_s, status.phases[0].started_s) == (100.0, 100.0)
    for before, after in pairwise(status.phases):
        assert after.started_s == pytest.approx(before.ended_s)
    assert sum(p.duration_s for p in status.phases) == pytest.approx(status.boot_s)


async def test_a_load_is_loading_from_its_first_moment() -> None:
    async with started(model="") as b:
        b.engine.boots = False
        load = await _begun(b, b.client.load(MODEL))
        await b.until(lambda: b.client.status.phase == "check")
        assert b.client.status.state is EngineState.LOADING
        b.engine.link.become_ready()
        await _within(load)


async def test_a_model_that_is_refused_leaves_the_engine_on_standby() -> None:
    async with started(model="") as b:
        b.engine.boots = False
        load = await _begun(b, b.client.load(MODEL))
        b.engine.link.stand_by("a is not a folder")
        with pytest.raises(SetupError, match="a is not a folder"):
            await _within(load)
        status = b.client.status
        assert (status.state, status.reason) == (EngineState.STANDBY, "a is not a folder")
        b.engine.boots = True
        await _within(b.client.load(OTHER))
        assert (b.client.status.state, b.client.status.reason) == (EngineState.READY, "")
        assert len(b.engine.links) == 1


async def test_unload_ends_streams_as_aborted_and_is_over_when_the_engine_says_so() -> None:
    async with started(FakeEngine(is_held=True)) as b:
        stream = b.submit()
        b.engine.link.step()
        b.engine.boots = False
        unload = await _begun(b, b.client.unload())
        assert (b.client.status.state, b.client.status.phase) == (EngineState.STARTING, "unload")
        with pytest.raises(NotReady):
            b.submit("b")
        b.engine.link.stand_by()
        await _within(unload)
        assert b.client.status.state is EngineState.STANDBY
        assert b.client.status.facts is None
        reasons = [o.finish_reason for o in await stream.next()]
        assert reasons[-1] is FinishReason.ABORTED
        assert b.client.num_live_requests == 0


async def test_sleep_remembers_what_wake_brings_back() -> None:
    async with started(model="") as b:
        await _within(b.client.load(MODEL))
        await _within(b.client.sleep())
        assert b.client.status.state is EngineState.SLEEPING
        with pytest.raises(NotReady, match="sleeping"):
            b.submit()
        await _within(b.client.wake())
        assert b.engine.link.received[-1] == Boot(MODEL)
        assert await read_all(b.submit()) == EXPECTED
        assert len(b.engine.links) == 1


async def test_a_wake_that_is_refused_leaves_the_model_asleep() -> None:
    async with started() as b:
        await _within(b.client.sleep())
        b.engine.boots = False
        wake = await _begun(b, b.client.wake())
        b.engine.link.stand_by("not enough memory")
        with pytest.raises(SetupError, match="not enough memory"):
            await _within(wake)
        assert b.client.status.state is EngineState.SLEEPING


async def test_a_sleeping_model_can_be_forgotten() -> None:
    async with started() as b:
        await _within(b.client.sleep())
        await _within(b.client.unload())
        assert b.client.status.state is EngineState.STANDBY
        await _within(b.client.load(OTHER))
        assert _booted(b) == ["fake", "b"]


async def test_what_is_done_already_is_not_done_again() -> None:
    async with started() as b:
        await _within(b.client.wake())
        await _within(b.client.sleep())
        await _within(b.client.sleep())
        await _within(b.client.unload())
        await _within(b.client.unload())
        assert b.engine.link.received.count(Unload()) == 1
        assert _booted(b) == ["fake"]


# ---- what a state does not allow ---------------------------------------------------------------


ORDERS: dict[str, Callable[[EngineClient], Awaitable[None]]] = {
    "LoadModel": lambda client: client.load(MODEL),
    "UnloadModel": lambda client: client.unload(),
    "Sleep": lambda client: client.sleep(),
    "Wake": lambda client: client.wake(),
}


async def _refused(client: EngineClient, order: str) -> str:
    with pytest.raises(WrongState) as error:
        await _within(ORDERS[order](client))
    return str(error.value)


async def test_a_ready_model_is_not_replaced_silently() -> None:
    async with started() as b:
        message = await _refused(b.client, "LoadModel")
    assert message == (
        "LoadModel is not possible in state READY: it allows UnloadModel, Sleep, Wake"
    )


@pytest.mark.parametrize("order", ["Sleep", "Wake"])
async def test_on_standby_there_is_nothing_to_sleep_or_wake(order: str) -> None:
    async with started(model="") as b:
        assert "STANDBY: it allows LoadModel, UnloadModel" in await _refused(b.client, order)


async def test_a_sleeping_model_is_not_replaced_silently() -> None:
    async with started() as b:
        await _within(b.client.sleep())
        assert "it allows UnloadModel, Sleep, Wake" in await _refused(b.client, "LoadModel")


@pytest.mark.parametrize("order", ORDERS)
async def test_one_change_at_a_time(order: str) -> None:
    async with started(model="") as b:
        b.engine.boots = False
        load = await _begun(b, b.client.load(MODEL))
        assert "LOADING" in await _refused(b.client, order)
        b.engine.link.become_ready()
        await _within(load)
        unload = await _begun(b, b.client.unload())
        assert "STARTING" in await _refused(b.client, order)
        b.engine.link.stand_by()
        await _within(unload)


# ---- deaths ------------------------------------------------------------------------------------


async def _killed(bench: Bench, reason: str = "killed by SIGKILL") -> None:
    num_links = len(bench.engine.links)
    bench.engine.link.end(reason)
    await bench.until(lambda: len(bench.engine.links) > num_links)


async def test_an_engine_killed_on_standby_is_replaced_by_one_on_standby() -> None:
    async with started(model="") as b:
        await _killed(b)
        await b.until_state(EngineState.STANDBY)
        assert (_booted(b), b.client.status.num_restarts) == ([""], 1)
        await _within(b.client.load(MODEL))
        assert await read_all(b.submit()) == EXPECTED


async def test_an_engine_killed_after_a_load_is_replaced_by_one_with_that_model() -> None:
    async with started(model="") as b:
        await _within(b.client.load(MODEL))
        await _killed(b)
        await b.until_state(EngineState.READY)
        assert b.engine.link.received == [Boot(MODEL)]


async def test_an_engine_killed_after_an_unload_is_replaced_by_one_on_standby() -> None:
    async with started() as b:
        await _within(b.client.unload())
        await _killed(b)
        await b.until_state(EngineState.STANDBY)
        assert _booted(b) == [""]


async def test_an_engine_killed_in_its_sleep_still_knows_what_to_wake() -> None:
    async with started() as b:
        await _within(b.client.sleep())
        await _killed(b)
        await b.until_state(EngineState.SLEEPING)
        await _within(b.client.wake())
        assert _booted(b) == ["", "fake"]


async def test_a_model_that_kills_its_engine_is_not_tried_again() -> None:
    async with started(model="") as b:
        b.engine.boots = False
        load = await _begun(b, b.client.load(MODEL))
        b.engine.boots = True
        await _killed(b)
        with pytest.raises(EngineDied, match="SIGKILL"):
            await _within(load)
        await b.until_state(EngineState.STANDBY)
        assert _booted(b) == [""]


async def test_an_unload_outlives_the_engine_that_should_do_it() -> None:
    async with started(FakeEngine(is_held=True)) as b:
        stream = b.submit()
        b.engine.boots = False
        unload = await _begun(b, b.client.unload())
        b.engine.boots = True
        await _killed(b)
        await _within(unload)
        assert b.client.status.state is EngineState.STANDBY
        assert _booted(b) == [""]
        assert [o.finish_reason for o in await stream.next()] == [FinishReason.ABORTED]


async def test_a_server_that_stops_ends_the_load_that_waits() -> None:
    async with started(model="") as b:
        b.engine.boots = False
        load = await _begun(b, b.client.load(MODEL))
        await b.client.stop()
        with pytest.raises(EngineDied):
            await _within(load)


@pytest.mark.parametrize("order", ["LoadModel", "UnloadModel"])
async def test_without_restarts_an_order_ends_with_the_engine(order: str) -> None:
    async with started(model="" if order == "LoadModel" else "fake", restarts=False) as b:
        b.engine.boots = False
        work = await _begun(b, ORDERS[order](b.client))
        b.engine.link.end("killed by SIGKILL")
        with pytest.raises(EngineDied, match="SIGKILL"):
            await _within(work)
        assert b.client.status.state is EngineState.FAILED


async def test_a_death_is_not_blamed_on_the_load_that_failed_before() -> None:
    async with started(model="", restarts=False) as b:
        b.engine.boots = False
        load = await _begun(b, b.client.load(MODEL))
        b.engine.link.stand_by("a is not a folder")
        with pytest.raises(SetupError):
            await _within(load)
        b.engine.link.end("killed by SIGKILL")
        assert (await b.client.wait_ended()).reason == "killed by SIGKILL"


# ---- silence -----------------------------------------------------------------------------------


async def test_silence_on_standby_is_no_stall() -> None:
    async with started(heartbeat_timeout_s=1.0, stall_kill_s=1.0) as b:
        await _within(b.client.unload())
        await b.pass_time(60.0)
        assert b.client.status.state is EngineState.STANDBY
        assert b.client.heartbeat_age_s == 0.0
        assert len(b.engine.links) == 1


async def test_an_engine_that_cannot_unload_is_killed() -> None:
    async with started(heartbeat_timeout_s=1.0, stall_kill_s=1.0) as b:
        b.engine.boots = False
        unload = await _begun(b, b.client.unload())
        b.engine.boots = True
        await b.pass_time(UNLOAD_TIMEOUT_S - 1.0)
        assert len(b.engine.links) == 1, "it gets its time"
        await b.pass_time(3.0)
        await _within(unload)
        assert (b.client.status.state, len(b.engine.links)) == (EngineState.STANDBY, 2)


# ---- callers who leave -------------------------------------------------------------------------


async def test_a_load_goes_on_without_its_caller() -> None:
    async with started(model="") as b:
        b.engine.boots = False
        load = await _begun(b, b.client.load(MODEL))
        load.cancel()
        await asyncio.wait({load})
        b.engine.link.become_ready()
        await b.until_state(EngineState.READY)
        assert await read_all(b.submit()) == EXPECTED
