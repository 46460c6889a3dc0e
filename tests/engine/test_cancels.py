"""Ten thousand requests cancelled at random moments: nothing may stay behind."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from pilotlight.engine.core import EngineCore
from pilotlight.engine.messages import FinishReason, Submit
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.engine.scheduler import Scheduler
from pilotlight.tests.fake_runner import KvCheckingRunner

NUM_REQUESTS = 10_000
NUM_BLOCKS = 40


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_ten_thousand_random_cancels_leave_nothing(max_in_flight: int) -> None:
    dice = random.Random(0)
    core = _core(max_in_flight)
    endings: Counter[tuple[str, int]] = Counter()
    num_sequences = num_submitted = 0
    live: list[str] = []
    while num_submitted < NUM_REQUESTS or core.has_work:
        for _ in range(min(dice.randrange(12), NUM_REQUESTS - num_submitted)):
            request_id, n = f"r{num_submitted}", dice.choice((1, 1, 1, 2, 3))
            core.submit(_request(request_id, n, dice))
            live.append(request_id)
            num_submitted += 1
            num_sequences += n
        dice.shuffle(live)
        core.abort([live.pop() for _ in range(min(len(live), dice.randrange(12)))])
        record = core.step()
        endings.update(
            (output.request_id, output.index)
            for output in (record.outputs if record else ())
            if output.finish_reason
        )
    core.check_integrity()
    assert len(endings) == num_sequences
    assert set(endings.values()) == {1}, "every sequence ends once"
    statistics = core.statistics()
    assert statistics.num_preemptions > 0, "the block shortage never bit"
    assert core.live_request_ids() == []
    assert statistics.num_used_blocks == statistics.num_running == statistics.num_waiting == 0


def _core(max_in_flight: int) -> EngineCore:
    scheduler = Scheduler(
        num_blocks=NUM_BLOCKS,
        block_size=4,
        context_len=60,
        eos_token_ids=[],
        max_num_seqs=8,
        max_batched_tokens=32,
    )
    runner = KvCheckingRunner(NUM_BLOCKS, 4)
    return EngineCore(scheduler, runner, clock=lambda: 0.0, max_in_flight=max_in_flight)


def _request(request_id: str, n: int, dice: random.Random) -> Submit:
    family, length = dice.randrange(5), dice.randint(1, 40)
    prompt = [(family + p) % 50 for p in range(length)]
    sampling = SamplingParams(temperature=0.0, max_tokens=dice.randint(1, 20), n=n)
    return Submit(request_id, prompt, sampling)


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_cancel_is_freed_within_two_steps(max_in_flight: int) -> None:
    core = _core(max_in_flight)
    dice = random.Random(1)
    for i in range(20):
        core.submit(_request(f"r{i}", 1, dice))
    for i in range(20):
        core.step()
        core.abort([f"r{i}"])
        records = [core.step(), core.step()]
        ended = [o for r in records if r for o in r.outputs if o.request_id == f"r{i}"]
        assert not ended or ended[-1].finish_reason is FinishReason.ABORTED
        assert f"r{i}" not in core.live_request_ids()
    assert core.statistics().num_used_blocks == 0
