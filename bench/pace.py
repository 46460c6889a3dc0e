"""`pilotlight bench pace`: what a prompt costs streams, and what limiting that costs the prompt.

Boots the engine once per limit (`--max-decode-slowdown`), lets a few sequences decode, and sends a
long prompt among them. With a trace, the scheduler then replays it in virtual time, with steps that
take what they were measured to take here: days of policy in seconds. Knows the engine, no server.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.boot import boot
from ..engine.boot_report import Unheard
from ..engine.config import EngineConfig
from ..engine.core import EngineCore
from ..engine.messages import StepRecord, Submit
from ..engine.sampling_params import SamplingParams
from ..server.config import DEMO_MODEL
from .pace_replay import StepCosts, capacity_speed, replayed
from .traces import read_trace

SLOWDOWNS = (0.0, 4.0, 2.0, 1.5)
OVERTAKING = (0.0, 2.0)
"""Beside the default, at the default limit."""
NUM_IDLE_STEPS = 100
COST_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NUM_COST_STEPS = 5
EPILOG = """\
examples:
  pilotlight bench pace MODEL --dtype bfloat16 --prompt-len 4096
  pilotlight bench pace MODEL --trace conversation.csv --load 0.8 --max-requests 500

Between tokens means: of the streams that decode, while the prompt is computed. idle is the same
without the prompt. The replay's times are computed, not waited for: step times by the number of
tokens and of the tokens attended to, as measured at its start. load is the share of the rate at
which requests would wait without end. overtaking is --max-overtaking, 0 first come, first served.
"""


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    slowdowns = arguments.slowdown or SLOWDOWNS
    rows = [interference(arguments, slowdown) for slowdown in slowdowns]
    result = {
        "model": Path(arguments.model).resolve().name,
        "dtype": arguments.dtype,
        "prompt_len": arguments.prompt_len,
        "num_streams": arguments.num_streams,
        "rows": rows,
    }
    lines = interference_table(result)
    if arguments.trace is not None:
        result["replay"] = _replay(arguments, slowdowns)
        lines += ["", *replay_table(result["replay"])]
    print("\n".join(lines), file=sys.stderr)
    if arguments.save is not None:
        arguments.save.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        arguments.save.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="pilotlight bench pace",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = top.add_argument
    add("model", nargs="?", default=str(DEMO_MODEL), help="checkpoint folder (default: the demo)")
    add("--slowdown", type=float, action="append", metavar="TIMES",
        help=f"a limit; repeatable, 0: none (default: {SLOWDOWNS})")  # fmt: skip
    add("--prompt-len", type=int, default=4096, metavar="TOKENS", help="(default: %(default)s)")
    add("--num-streams", type=int, default=1, metavar="N", help="(default: %(default)s)")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    add("--dtype", default="auto", choices=dtypes, help="(default: %(default)s)")
    add("--trace", type=Path, metavar="FILE", help="replay it (CSV or JSON lines)")
    add("--load", type=float, default=0.8, metavar="SHARE", help="(default: %(default)s)")
    add("--max-requests", type=int, default=500, metavar="N", help="(default: %(default)s)")
    add("--max-model-len", type=int, default=8192, metavar="TOKENS", help="(default: %(default)s)")
    add("--save", type=Path, metavar="PATH", help="also write PATH.json and PATH.md")
    return top


def _booted(arguments: argparse.Namespace, slowdown: float) -> tuple[EngineCore, int]:
    config = EngineConfig(
        model=arguments.model,
        dtype=arguments.dtype,
        max_model_len=arguments.max_model_len,
        max_decode_slowdown=slowdown,
        prefix_cache=False,
        speculative="off",
    )
    engine = boot(config, Unheard(), lambda: None)
    return engine.core, engine.facts.vocab_size


# ---- one prompt among streams ------------------------------------------------------------------


def interference(arguments: argparse.Namespace, slowdown: float) -> dict[str, float]:
    """Seconds between the streams' tokens, without and beside the prompt, and to its first."""
    core, vocab_size = _booted(arguments, slowdown)
    submit(core, vocab_size, "alone", arguments.prompt_len, 1)
    alone_s = sum(record.duration_s for record in steps_until(core, "alone"))
    for i in range(arguments.num_streams):
        submit(core, vocab_size, f"stream {i}", 16, arguments.max_model_len - 32)
    warm = [step(core) for _ in range(NUM_IDLE_STEPS + 5)][5:]
    submit(core, vocab_size, "prompt", arguments.prompt_len, 1)
    busy = steps_until(core, "prompt")
    idle_s, idle_p99_s = np.percentile([record.duration_s for record in warm], (50, 99))
    beside = [record.duration_s for record in busy]
    p50_s, p99_s = np.percentile(beside, (50, 99))
    row = {
        "max_decode_slowdown": slowdown,
        "prompt_alone_s": round(alone_s, 3),
        "prompt_s": round(sum(beside), 3),
        "idle_ms": round(1e3 * float(idle_s), 1),
        "idle_p99_ms": round(1e3 * float(idle_p99_s), 1),
        "p50_ms": round(1e3 * float(p50_s), 1),
        "p99_ms": round(1e3 * float(p99_s), 1),
        "p99_over_idle": round(float(p99_s / idle_s), 2),
        "p99_over_idle_p99": round(float(p99_s / idle_p99_s), 2),
    }
    print(f"pilotlight: limit {slowdown:g}: {row}", file=sys.stderr)
    return row


def submit(core: EngineCore, vocab_size: int, name: str, num_in: int, num_out: int) -> None:
    source = random.Random(name)
    prompt = [source.randrange(vocab_size) for _ in range(num_in)]
    sampling = SamplingParams(max_tokens=num_out, temperature=0.0, ignore_eos=True)
    core.submit(Submit(name, prompt, sampling))


def step(core: EngineCore) -> StepRecord:
    record = core.step()
    assert record is not None
    return record


def steps_until(core: EngineCore, name: str) -> list[StepRecord]:
    """The steps up to the one that brings this sequence's first token."""
    records = [step(core)]
    while not any(output.request_id == name for output in records[-1].outputs):
        records.append(step(core))
    return records


def interference_table(result: dict[str, Any]) -> list[str]:
    lines = [
        f"A prompt of {result['prompt_len']} tokens among {result['num_streams']} decoding, "
        f"{result['model']}, {result['dtype']}.",
        "",
        "| limit | prompt alone, s | prompt, s | between tokens idle, ms | its p99, ms | p50, ms "
        "| p99, ms | p99 / idle | p99 / idle p99 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        names = (
            "prompt_alone_s", "prompt_s", "idle_ms", "idle_p99_ms", "p50_ms", "p99_ms",
            "p99_over_idle", "p99_over_idle_p99",
        )  # fmt: skip
        lines.append(f"| {_name(r)} | {' | '.join(str(r[name]) for name in names)} |")
    return lines


def _name(row: dict[str, Any]) -> str:
    return f"{row['max_decode_slowdown']:g}" if row["max_decode_slowdown"] else "none"


# ---- a trace -----------------------------------------------------------------------------------


def measured_costs(arguments: argparse.Namespace) -> StepCosts:
    """Seconds of steps, by what is in them."""
    core, vocab_size = _booted(arguments, 0.0)
    by_tokens = {}
    for num in COST_TOKENS:
        spent = []
        for i in range(NUM_COST_STEPS + 1):
            # Another prompt each time: samples of one name share its blocks.
            submit(core, vocab_size, f"cost {num} {i}", num, 1)
            spent.append(step(core).duration_s)
        by_tokens[num] = statistics.median(spent[1:])
    return StepCosts(by_tokens, _context_cost(core, vocab_size, arguments))


def _context_cost(core: EngineCore, vocab_size: int, arguments: argparse.Namespace) -> float:
    """Seconds of a decode for each token that it attends to."""
    medians = []
    lengths = (16, arguments.max_model_len // 2)
    for length in lengths:
        submit(core, vocab_size, f"context {length}", length, 2 * NUM_COST_STEPS)
        steps_until(core, f"context {length}")
        spent = [step(core).duration_s for _ in range(2 * NUM_COST_STEPS - 1)]
        medians.append(statistics.median(spent))
    return float(max(0.0, medians[1] - medians[0]) / (lengths[1] - lengths[0]))


def _replay(arguments: argparse.Namespace, slowdowns: Sequence[float]) -> dict[str, Any]:
    costs = measured_costs(arguments)
    plans = read_trace(arguments.trace).plans[: arguments.max_requests]
    speed = arguments.load * capacity_speed(plans, costs, arguments.max_model_len)
    default = EngineConfig(model="")
    limits = [(slowdown, default.max_overtaking) for slowdown in slowdowns]
    limits += [(default.max_decode_slowdown, overtaking) for overtaking in OVERTAKING]
    rows = []
    for slowdown, overtaking in limits:
        found = replayed(plans, speed, costs, arguments.max_model_len, slowdown, overtaking)
        rows.append({"max_decode_slowdown": slowdown, "max_overtaking": overtaking, **found})
    return {
        "trace": arguments.trace.name,
        "num_requests": len(plans),
        "load": arguments.load,
        "speed": round(speed, 6),
        "step_ms_by_tokens": {n: round(1e3 * s, 2) for n, s in costs.by_tokens.items()},
        "context_us": round(1e6 * costs.context_s, 3),
        "rows": rows,
    }


def replay_table(replay: dict[str, Any]) -> list[str]:
    lines = [
        f"The first {replay['num_requests']} requests of {replay['trace']} at "
        f"{replay['load']:g} of capacity, in virtual time.",
        "",
        "| limit | overtaking | TTFT p50, s | p99, s | of the shortest quarter p50, s "
        "| between tokens p50, ms | p99, ms | max, ms | output tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in replay["rows"]:
        cells = (
            f"{r['max_overtaking']:g}", r["ttft_p50_s"], r["ttft_p99_s"], r["ttft_short_p50_s"],
            r["itl_p50_ms"], r["itl_p99_ms"], r["itl_max_ms"], r["output_tokens_per_s"],
        )  # fmt: skip
        lines.append(f"| {_name(r)} | {' | '.join(map(str, cells))} |")
    return lines
