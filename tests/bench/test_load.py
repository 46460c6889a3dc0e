"""The load generator against a whole server on loopback: open and closed loops, and their ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import repeat
from typing import Any

import pytest
from pilotlight.bench import load as load_module
from pilotlight.bench.arrivals import Planned
from pilotlight.bench.latency import Objectives, summary
from pilotlight.bench.load import Load, Prompts
from pilotlight.engine.messages import Submit
from pilotlight.tests.bench.clock import Clock, set_clock
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.served import LIMIT_S, Served, served

VOCAB_SIZE = 200
AT_ONCE = Planned(0.0, 6, 4)


def load_of(s: Served, **options: Any) -> Load:
    return Load(s.stub, Prompts(VOCAB_SIZE, 0, seed=0), **options)


async def run(load: Load, plans: Iterable[Planned], concurrency: int | None = None) -> None:
    async with asyncio.timeout(LIMIT_S):
        await load.run(plans, concurrency)


def submits(s: Served) -> list[Submit]:
    return [m for m in s.engine.link.received if isinstance(m, Submit)]


def codes(load: Load) -> list[str]:
    return [outcome.code for outcome in load.outcomes]


# ---- prompts ---------------------------------------------------------------------------------


def test_prompts_have_the_planned_length_and_end_after_the_planned_tokens() -> None:
    request = Prompts(VOCAB_SIZE, 0, seed=0).request(Planned(0.0, 12, 34))
    assert len(request.token_ids.ids) == 12
    assert all(0 <= i < VOCAB_SIZE for i in request.token_ids.ids)
    assert request.stop.max_tokens == 34
    assert request.stop.ignore_eos
    assert request.sampling.HasField("temperature")
    assert request.sampling.temperature == 0.0


def test_prompts_share_a_prefix_and_differ_behind_it() -> None:
    prompts = Prompts(VOCAB_SIZE, 8, seed=0)
    one, two, short = (list(prompts.request(Planned(0.0, n, 1)).token_ids.ids) for n in (20, 20, 5))
    assert one[:8] == two[:8]
    assert one[8:] != two[8:]
    assert short == one[:5]


def test_a_seed_writes_the_same_prompts() -> None:
    one, same, other = (Prompts(VOCAB_SIZE, 4, seed).request(AT_ONCE) for seed in (1, 1, 2))
    assert one == same
    assert one != other


# ---- the open loop ---------------------------------------------------------------------------


async def test_an_open_loop_sends_whatever_became_of_those_before() -> None:
    """All are sent while the engine does not move, and all succeed once it does."""
    async with served(FakeEngine(is_held=True)) as s:
        load = load_of(s)
        task = asyncio.create_task(run(load, [AT_ONCE] * 6))
        await s.until(lambda: len(submits(s)) == 6)
        assert load.num_ended == 0
        s.engine.link.release()
        await task
    assert codes(load) == ["OK"] * 6
    assert load.num_ended == 6
    assert [outcome.num_output_tokens for outcome in load.outcomes] == [4] * 6


async def test_each_request_waits_until_it_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served() as s:
        clock = set_clock(monkeypatch, Clock())
        load = load_of(s)
        await run(load, [Planned(at_s, 6, 2) for at_s in (0.0, 30.0, 30.0, 90.0)])
    assert clock.sleeps == [0.0, 30.0, 0.0, 60.0]
    assert [outcome.sent_s - load.began_s for outcome in load.outcomes] == [0.0, 30.0, 30.0, 90.0]
    assert codes(load) == ["OK"] * 4


async def test_a_client_that_falls_behind_measures_from_when_requests_were_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every reading of the clock takes 10 s here, so that each request is sent late."""
    async with served() as s:
        clock = set_clock(monkeypatch, Clock(tick_s=10.0))
        load = load_of(s)
        await run(load, [Planned(at_s, 6, 2) for at_s in (0.0, 1.0, 2.0)])
    assert clock.sleeps == [0.0] * 3
    assert [outcome.due_s - load.began_s for outcome in load.outcomes] == [0.0, 1.0, 2.0]
    assert all(outcome.sent_s - outcome.due_s > 10.0 for outcome in load.outcomes)


async def test_nothing_is_sent_that_is_due_after_the_duration() -> None:
    async with served() as s:
        load = load_of(s, duration_s=0.5)
        await run(load, [Planned(at_s, 6, 2) for at_s in (0.0, 0.0, 0.5, 3600.0)])
    assert codes(load) == ["OK", "OK"]


# ---- the closed loop -------------------------------------------------------------------------


async def test_a_closed_loop_never_has_more_requests_than_places() -> None:
    async with served(FakeEngine(is_held=True)) as s:
        load = load_of(s)
        task = asyncio.create_task(run(load, [AT_ONCE] * 7, concurrency=3))
        most_live = 0
        while not task.done():
            s.engine.link.step()
            num_live = len(load.outcomes) - load.num_ended
            assert len(s.engine.link.core.live_request_ids()) <= 3
            most_live = max(most_live, num_live)
            await asyncio.sleep(0)
        await task
    assert most_live == 3
    assert codes(load) == ["OK"] * 7


async def test_places_share_the_plans() -> None:
    """Each is sent once, in order, whatever place takes it."""
    plans = [Planned(0.0, length, 2) for length in range(1, 10)]
    async with served() as s:
        load = load_of(s)
        await run(load, plans, concurrency=4)
        assert sorted(len(m.prompt_ids) for m in submits(s)) == list(range(1, 10))
    assert [outcome.planned for outcome in load.outcomes] == plans


async def test_a_closed_loop_ends_with_the_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plans have no end; time moves by 1 s with every reading of the clock."""
    async with served() as s:
        set_clock(monkeypatch, Clock(tick_s=1.0))
        load = load_of(s, duration_s=40.0)
        await run(load, repeat(AT_ONCE), concurrency=2)
    assert load.outcomes
    assert set(codes(load)) == {"OK"}
    assert all(outcome.due_s - load.began_s < 40.0 for outcome in load.outcomes)


async def test_a_place_rests_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here every request is too long for the context."""
    async with served(FakeEngine(context_len=16)) as s:
        clock = set_clock(monkeypatch, Clock())
        load = load_of(s)
        await run(load, [Planned(0.0, 32, 2)] * 3, concurrency=1)
    assert codes(load) == ["INVALID_ARGUMENT"] * 3
    assert clock.sleeps == [load_module.REFUSED_PAUSE_S] * 3


# ---- errors ----------------------------------------------------------------------------------


async def test_refusals_are_counted_by_their_status_beside_successes() -> None:
    """Two places in the server, five requests at once."""
    async with served(FakeEngine(is_held=True), max_queued_requests=2) as s:
        load = load_of(s)
        task = asyncio.create_task(run(load, [AT_ONCE] * 5))
        await s.until(lambda: load.num_ended == 3)
        s.engine.link.release()
        await task
    figures = summary(load.outcomes, load.began_s, Objectives(ttft_ms=1e9))
    assert figures["errors"] == {"RESOURCE_EXHAUSTED": 3}
    assert figures["num_ok"] == 2
    assert figures["goodput_requests_per_s"] == figures["requests_per_s"] > 0
    refused = [outcome for outcome in load.outcomes if outcome.code != "OK"]
    assert all("max_queued_requests" in outcome.message for outcome in refused)


async def test_an_engine_that_dies_ends_requests_with_a_status() -> None:
    async with served(FakeEngine(is_held=True)) as s:
        load = load_of(s)
        task = asyncio.create_task(run(load, [AT_ONCE] * 3))
        await s.until(lambda: len(submits(s)) == 3)
        s.engine.link.kill()
        await task
    assert codes(load) == ["UNAVAILABLE"] * 3
    assert load.num_ended == 3


async def test_a_deadline_is_of_each_request() -> None:
    async with served(FakeEngine(is_held=True)) as s:
        load = load_of(s, deadline_s=0.05)
        await run(load, [AT_ONCE] * 2)
        await s.until(lambda: not s.engine.link.core.live_request_ids())
    assert codes(load) == ["DEADLINE_EXCEEDED"] * 2


# ---- interrupted -----------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [None, 3])
async def test_what_was_under_way_is_cancelled_and_what_came_before_stays(
    concurrency: int | None,
) -> None:
    async with served() as s:
        load = load_of(s)
        await run(load, [AT_ONCE] * 2)
        s.engine.link.is_held = True
        task = asyncio.create_task(load.run([AT_ONCE] * 3, concurrency))
        await s.until(lambda: len(submits(s)) == 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await s.until(lambda: not s.engine.link.core.live_request_ids())
    assert codes(load) == ["OK"] * 2 + ["CANCELLED"] * 3
    assert load.num_ended == 5
