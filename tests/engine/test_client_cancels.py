"""Ten thousand streams given up at random moments: neither front nor engine keeps any of them."""

from __future__ import annotations

import asyncio
import random

from pilotlight.engine.messages import Submit
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.tests.engine.test_client import Bench, started
from pilotlight.tests.fake_engine import FakeEngine

NUM_REQUESTS = 10_000
NUM_AT_ONCE = 24


async def _one(bench: Bench, number: int, dice: random.Random) -> bool:
    """Submits, reads a little or nothing, gives up; True when it had ended by itself."""
    max_tokens, n = dice.choice((1, 2, 20)), dice.choice((1, 1, 2))
    sampling = SamplingParams(max_tokens=max_tokens, n=n, temperature=0.0)
    prompt = [dice.randrange(50) for _ in range(dice.randrange(1, 30))]
    stream = bench.client.submit(Submit(f"r{number}", prompt, sampling))
    for _ in range(dice.choice((0, 1, 2, 12))):
        await stream.next()
    for _ in range(dice.randrange(3)):
        await asyncio.sleep(0)
    was_ended = stream.is_ended
    stream.cancel()
    return was_ended


async def test_ten_thousand_cancelled_streams_leave_nothing() -> None:
    dice = random.Random(1)
    engine = FakeEngine(num_blocks=16, max_num_seqs=8, max_batched_tokens=32, context_len=60)
    async with started(engine) as bench:
        numbers = iter(range(NUM_REQUESTS))
        num_ended = 0

        async def work() -> None:
            nonlocal num_ended
            for number in numbers:
                was_ended = await _one(bench, number, dice)
                num_ended += was_ended

        await asyncio.gather(*(work() for _ in range(NUM_AT_ONCE)))
        core = engine.link.core
        await bench.until(lambda: not core.has_work)
        core.check_integrity()
        statistics = core.statistics()
        assert bench.client.num_live_requests == 0
        assert statistics.num_used_blocks == statistics.num_running == statistics.num_waiting == 0
        assert statistics.num_preemptions > 0, "the block shortage never bit"
        assert 0 < num_ended < NUM_REQUESTS
