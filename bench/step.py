"""`pilotlight bench step`: where a decode step's time goes. One JSON line out.

Times the engine's own functions while sequences decode, all of the same age: what the scheduler,
the input buffers, the sampler and the record cost beside the kernels. Medians over steps; the steps
that compute prompts and record a size for the first time are not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ..engine.boot import boot
from ..engine.channel import frame
from ..engine.config import EngineConfig
from ..engine.core import EngineCore
from ..engine.messages import Submit
from ..engine.sampling_params import SamplingParams
from ..engine.scheduler import Scheduler
from ..engine.worker.inputs import InputBuffers
from ..engine.worker.recorded import RecordedSteps
from ..engine.worker.sampler import Sampler
from ..engine.worker.slots import SlotTables
from ..kernels.cpu import native
from ..server.config import DEMO_MODEL
from .throughput import SaidPhases

EPILOG = """\
examples:
  pilotlight bench step MODEL --num-seqs 1 8 64 --num-threads 1
  pilotlight bench step MODEL --sampling top-p --save bench/results/step-top-p

Outside the kernels: schedule, inputs, glue (the network's Python between kernels), sampler (log
probabilities and penalties: draws are a kernel's), apply, record (statistics, the message), channel
(msgpack; writing it to the socket is not in it).
"""

PARTS: tuple[tuple[str, type, str], ...] = (
    ("schedule", Scheduler, "schedule"),
    ("inputs", SlotTables, "apply"),
    ("inputs", InputBuffers, "fill"),
    ("network", RecordedSteps, "run"),
    ("kernels", native.Program, "run"),
    ("sampler", Sampler, "finish"),
    ("apply", Scheduler, "apply"),
)
COLUMNS = ("schedule", "inputs", "kernels", "glue", "sampler", "apply", "record", "channel")
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "free": {"temperature": 1.0},
    "top-k": {"temperature": 0.7, "top_k": 50},
    "top-p": {"temperature": 0.7, "top_p": 0.9},
    "logprobs": {"temperature": 0.0, "num_logprobs": 5},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.1},
}
NUM_UNCOUNTED_STEPS = 3
SPARE_TOKENS = 64
"""Of each sequence, so that the cache has a free block for all and none has to wait."""


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    core, vocab_size = booted(arguments)
    rows = [measured(core, vocab_size, n, arguments) for n in arguments.num_seqs]
    result = {
        "model": Path(arguments.model).resolve().name,
        "dtype": arguments.dtype,
        "sampling": arguments.sampling,
        "num_threads": torch.get_num_threads(),
        "native_level": native.level(),
        "input_len": arguments.input_len,
        "num_steps": arguments.output_len - NUM_UNCOUNTED_STEPS,
        "rows": rows,
    }
    if arguments.save is not None:
        arguments.save.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        arguments.save.with_suffix(".md").write_text(table(result))
    print(table(result), file=sys.stderr)
    print(json.dumps(result))
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="pilotlight bench step",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = top.add_argument
    add("model", nargs="?", default=str(DEMO_MODEL), help="checkpoint folder (default: the demo)")
    add("--num-seqs", type=int, nargs="+", default=[1, 8, 64], metavar="N")
    add("--input-len", type=int, default=64, metavar="TOKENS", help="(default: %(default)s)")
    add("--output-len", type=int, default=33, metavar="TOKENS", help="(default: %(default)s)")
    add("--sampling", default="greedy", choices=SAMPLINGS, help="(default: %(default)s)")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    add("--dtype", default="auto", choices=dtypes, help="(default: %(default)s)")
    add("--num-threads", type=int, default=0, metavar="N", help="0: as many as torch chooses")
    add("--save", type=Path, metavar="PATH", help="also write PATH.json and PATH.md")
    return top


def booted(arguments: argparse.Namespace) -> tuple[EngineCore, int]:
    config = EngineConfig(
        model=arguments.model,
        dtype=arguments.dtype,
        max_model_len=arguments.input_len + arguments.output_len + SPARE_TOKENS,
        max_num_seqs=max(arguments.num_seqs),
        num_threads=arguments.num_threads,
        prefix_cache=False,
        speculative="off",
    )
    engine = boot(config, SaidPhases(), lambda: None)
    return engine.core, engine.facts.vocab_size


# ---- steps ------------------------------------------------------------------------------------


def measured(
    core: EngineCore, vocab_size: int, num_seqs: int, arguments: argparse.Namespace
) -> dict[str, float]:
    """Median microseconds per part of a step of `num_seqs` decodes."""
    submit(core, vocab_size, num_seqs, arguments)
    steps = list(decode_steps(core, num_seqs))[NUM_UNCOUNTED_STEPS:]
    row: dict[str, float] = {"num_seqs": num_seqs}
    for part in ("step", *COLUMNS):
        row[f"{part}_us"] = round(1e6 * statistics.median(step[part] for step in steps), 1)
    outside = [1 - step["kernels"] / step["step"] for step in steps]
    row["outside_kernels_percent"] = round(100 * statistics.median(outside), 2)
    return row


def submit(core: EngineCore, vocab_size: int, num_seqs: int, arguments: argparse.Namespace) -> None:
    source = random.Random(num_seqs)
    for i in range(num_seqs):
        prompt = [source.randrange(vocab_size) for _ in range(arguments.input_len)]
        sampling = SamplingParams(
            max_tokens=arguments.output_len,
            ignore_eos=True,
            seed=i,
            **SAMPLINGS[arguments.sampling],
        )
        core.submit(Submit(f"{num_seqs}-{i}", prompt, sampling))


def decode_steps(core: EngineCore, num_seqs: int) -> Iterator[dict[str, float]]:
    """Seconds per part, of every step in which all sequences decode."""
    with timed_parts() as seconds:
        while core.has_work:
            seconds.clear()
            began_s = time.perf_counter()
            record = core.step()
            stepped_s = time.perf_counter()
            if record is not None:
                frame(record)
            ended_s = time.perf_counter()
            if record is not None and record.num_tokens == num_seqs:
                yield split(seconds, stepped_s - began_s, ended_s - stepped_s)


def split(seconds: dict[str, float], step_s: float, channel_s: float) -> dict[str, float]:
    """Columns that add up to the whole: what nobody claims is the record and the loop."""
    parts = {name: seconds.get(name, 0.0) for name in COLUMNS}
    parts["glue"] = seconds["network"] - parts["kernels"]
    parts["record"] = step_s - sum(parts.values())
    return {**parts, "channel": channel_s, "step": step_s + channel_s}


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Adds up the seconds spent in each of PARTS, meanwhile, by its name."""
    seconds: dict[str, float] = defaultdict(float)
    with ExitStack() as stack:
        for name, owner, method in PARTS:
            timed = _timed(getattr(owner, method), name, seconds)
            stack.enter_context(patch.object(owner, method, timed))
        yield seconds


def _timed(
    function: Callable[..., Any], name: str, seconds: dict[str, float]
) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        began_s = time.perf_counter()
        try:
            return function(*args)
        finally:
            seconds[name] += time.perf_counter() - began_s

    return timed


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    names = ("sequences", "step, ms", *(f"{name}, us" for name in COLUMNS), "outside kernels")
    lines = [
        f"Decode steps of {result['model']}, {result['dtype']}, {result['sampling']}, "
        f"{result['num_threads']} threads, {result['native_level']}; "
        f"medians of {result['num_steps']} steps.",
        "",
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
    ]
    for row in result["rows"]:
        parts = " | ".join(f"{row[f'{name}_us']:.0f}" for name in COLUMNS)
        step_ms, outside = row["step_us"] / 1e3, row["outside_kernels_percent"]
        lines.append(f"| {row['num_seqs']} | {step_ms:.2f} | {parts} | {outside:.1f} % |")
    return "\n".join(lines) + "\n"
