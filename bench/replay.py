"""Requests through an engine's core at their times, in this process. Knows no server and no device.

The clock is the caller's: a real one, or one that steps are added to.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..engine.core import EngineCore
from ..engine.messages import Submit
from ..engine.sampling_params import SamplingParams
from .arrivals import Planned


def replay(
    core: EngineCore,
    plans: Sequence[Planned],
    vocab_size: int,
    clock: Callable[[], float],
    wait_until: Callable[[float], None],
    short_share: float = 0.0,
) -> dict[str, Any]:
    """Latencies and rate, from the moments at which requests were due. `plans` are in order.

    `short_share`: of all requests those with the shortest prompts, whose first token is told too.
    """
    source = random.Random(0)
    began_s = clock()
    due_s = {str(i): began_s + planned.at_s for i, planned in enumerate(plans)}
    came_s: dict[str, list[float]] = defaultdict(list)
    num_sent = 0
    while num_sent < len(plans) or core.has_work:
        while num_sent < len(plans) and due_s[str(num_sent)] <= clock():
            core.submit(_submit(num_sent, plans[num_sent], vocab_size, source))
            num_sent += 1
        record = core.step()
        if record is None:
            wait_until(due_s[str(num_sent)])
            continue
        now_s = clock()
        for output in record.outputs:
            came_s[output.request_id] += [now_s] * len(output.token_ids)
    figures = _figures(began_s, due_s, came_s)
    if short_share:
        by_length = sorted(range(len(plans)), key=lambda i: plans[i].input_len)
        short = [str(i) for i in by_length[: max(1, int(short_share * len(plans)))]]
        waited_s = [came_s[name][0] - due_s[name] for name in short]
        figures["ttft_short_p50_s"] = round(float(np.median(waited_s)), 3)
    return figures


def _submit(index: int, planned: Planned, vocab_size: int, source: random.Random) -> Submit:
    sampling = SamplingParams(max_tokens=planned.output_len, temperature=0.0, ignore_eos=True)
    prompt = [source.randrange(vocab_size) for _ in range(planned.input_len)]
    return Submit(str(index), prompt, sampling)


def _figures(
    began_s: float, due_s: Mapping[str, float], came_s: Mapping[str, list[float]]
) -> dict[str, Any]:
    ttft = [came_s[name][0] - at_s for name, at_s in due_s.items()]
    gaps = np.concatenate([np.diff(times) for times in came_s.values()])
    num_tokens = sum(map(len, came_s.values()))
    spent_s = max(times[-1] for times in came_s.values()) - began_s
    ttft_p50, ttft_p99 = np.percentile(ttft, (50, 99))
    gap_p50, gap_p99, gap_max = 1e3 * np.percentile(gaps, (50, 99, 100)) if len(gaps) else (0, 0, 0)
    return {
        "ttft_p50_s": round(float(ttft_p50), 3),
        "ttft_p99_s": round(float(ttft_p99), 3),
        "itl_p50_ms": round(float(gap_p50), 1),
        "itl_p99_ms": round(float(gap_p99), 1),
        "itl_max_ms": round(float(gap_max), 1),
        "output_tokens_per_s": round(num_tokens / spent_s, 2),
        "spent_s": round(spent_s, 3),
    }
