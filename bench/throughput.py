"""`pilotlight bench throughput`: the engine alone, here. Token ids in, one JSON line out.

All sequences arrive at once; each has its own random prompt and ends after exactly `output_len`
tokens. With --trace, requests come when and as long as those of a trace: what a server under the
same load (`bench serving --trace`) can be compared with. One uncounted run before the measured ones
brings kernels and memory to their state of use.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from ..engine.boot import boot
from ..engine.config import EngineConfig
from ..engine.core import EngineCore
from ..engine.messages import FinishReason, Submit
from ..engine.sampling_params import SamplingParams
from ..server.config import DEMO_MODEL
from ..server.sizes import size_bytes
from .arrivals import clamped
from .replay import replay
from .traces import read_trace

DEFAULT = EngineConfig(model="")

EPILOG = """\
examples:
  pilotlight bench throughput MODEL --num-seqs 32 --input-len 128 --output-len 64 --dtype bfloat16
  pilotlight bench throughput MODEL --num-seqs 1 --input-len 512 --output-len 1
"""


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    core, vocab_size, kernels = booted(arguments)
    if arguments.trace is not None:
        print(json.dumps(traced(core, vocab_size, arguments)))
        return 0
    runs = [run(core, vocab_size, arguments, seed) for seed in range(arguments.repeat + 1)][1:]
    elapsed_s = statistics.median(runs)
    num_output = arguments.num_seqs * arguments.output_len
    num_total = num_output + arguments.num_seqs * arguments.input_len
    print(
        json.dumps(
            {
                "output_tokens_per_s": round(num_output / elapsed_s, 2),
                "total_tokens_per_s": round(num_total / elapsed_s, 2),
                "elapsed_s": round(elapsed_s, 4),
                "all_elapsed_s": [round(s, 4) for s in runs],
                "num_seqs": arguments.num_seqs,
                "input_len": arguments.input_len,
                "output_len": arguments.output_len,
                "kernels": kernels,
            }
        )
    )
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="pilotlight bench throughput",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = top.add_argument
    add("model", nargs="?", default=str(DEMO_MODEL), help="checkpoint folder (default: the demo)")
    add("--trace", type=Path, metavar="FILE", help="arrivals and lengths (CSV or JSON lines)")
    add("--speed", type=float, default=1.0, metavar="X", help="so many times as fast; inf: at once")
    add("--max-requests", type=int, metavar="N", help="of the trace")
    add("--num-seqs", type=int, default=32, metavar="N", help="(default: %(default)s)")
    add("--input-len", type=int, default=128, metavar="TOKENS", help="(default: %(default)s)")
    add("--output-len", type=int, default=64, metavar="TOKENS", help="(default: %(default)s)")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    add("--dtype", default="auto", choices=dtypes, help="(default: %(default)s)")
    add("--head-dtype", default="auto", choices=("auto", "int8"), help="(default: %(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--max-batched-tokens", type=int, default=2048, metavar="TOKENS")
    add("--kv-cache-bytes", default="0", metavar="BYTES", help="as 512MiB; 0: from what is free")
    modes = ("off", "auto", "ngram")
    add(
        "--speculative",
        default="off",
        choices=modes,
        help="random weights repeat themselves "
        "more than texts do, so drafts flatter them (default: %(default)s)",
    )
    caches = ("auto", "plain", "int8", "fp8")
    add("--kv-cache-dtype", default="auto", choices=caches, help="(default: %(default)s)")
    add("--deterministic", action="store_true", help="a request's tokens depend on it alone")
    add("--max-decode-slowdown", type=float, default=DEFAULT.max_decode_slowdown, metavar="TIMES",
        help="as of serve; 0: a burst's prompts take all (default: %(default)s)")  # fmt: skip
    add("--max-overtaking", type=float, default=DEFAULT.max_overtaking, metavar="TIMES",
        help="as of serve (default: %(default)s)")  # fmt: skip
    add("--num-threads", type=int, default=0, metavar="N", help="0: as many as torch chooses")
    add("--repeat", type=int, default=3, metavar="N", help="runs; the median counts")
    return top


def booted(arguments: argparse.Namespace) -> tuple[EngineCore, int, dict[str, str]]:
    config = EngineConfig(
        model=arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        head_dtype=arguments.head_dtype,
        max_model_len=arguments.input_len + arguments.output_len,
        max_num_seqs=arguments.num_seqs,
        max_batched_tokens=max(arguments.max_batched_tokens, arguments.num_seqs),
        kv_cache_bytes=size_bytes("--kv-cache-bytes", arguments.kv_cache_bytes),
        kv_cache_dtype=arguments.kv_cache_dtype,
        num_threads=arguments.num_threads,
        deterministic=arguments.deterministic,
        max_decode_slowdown=arguments.max_decode_slowdown,
        max_overtaking=arguments.max_overtaking,
        prefix_cache=False,
        speculative=arguments.speculative,
    )
    booted = boot(config, SaidPhases(), lambda: None)
    return booted.core, booted.facts.vocab_size, booted.facts.kernels


class SaidPhases:
    """A boot's phases on stderr, as they begin."""

    def __call__(self, phase: str, bytes_done: int, bytes_total: int, detail: str) -> None:
        if bytes_done == 0:
            print(f"pilotlight: {phase} {detail}", file=sys.stderr)

    def located(self, folder: str) -> None:
        """Where the files are is no news here."""

    def beside(self, name: str, lane: str, began_s: float, ended_s: float) -> None:
        """Only the boot's own line is told."""


def traced(core: EngineCore, vocab_size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Latencies and rate under a trace; contexts as long as --input-len and --output-len say."""
    context_len = arguments.input_len + arguments.output_len
    trace = read_trace(arguments.trace).faster(arguments.speed)
    plans = [clamped(planned, context_len) for planned in trace.plans[: arguments.max_requests]]
    warm_up = argparse.Namespace(num_seqs=arguments.num_seqs, input_len=16, output_len=8)
    run(core, vocab_size, warm_up, 0)
    return replay(core, plans, vocab_size, time.perf_counter, sleep_until)


def sleep_until(at_s: float) -> None:
    """By time.perf_counter."""
    time.sleep(max(0.0, at_s - time.perf_counter()))


def run(core: EngineCore, vocab_size: int, arguments: argparse.Namespace, seed: int) -> float:
    """Seconds from submission to the last token. Every sequence must end by length."""
    source = random.Random(seed)
    sampling = SamplingParams(max_tokens=arguments.output_len, temperature=0.0, ignore_eos=True)
    for i in range(arguments.num_seqs):
        prompt = [source.randrange(vocab_size) for _ in range(arguments.input_len)]
        core.submit(Submit(f"{seed}-{i}", prompt, sampling))
    num_ended = 0
    began_s = time.perf_counter()
    while core.has_work:
        record = core.step()
        for output in record.outputs if record else ():
            num_ended += output.finish_reason is FinishReason.LENGTH
    elapsed_s = time.perf_counter() - began_s
    if num_ended != arguments.num_seqs:
        raise SystemExit(f"only {num_ended} of {arguments.num_seqs} sequences ended by length")
    return elapsed_s
