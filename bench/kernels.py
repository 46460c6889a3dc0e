"""Times every implementation of every operation on the shapes of a real model.

    python -m pilotlight.bench.kernels --op linear --dtype bfloat16

A result is checked against the reference before it is timed. Knows no engine and no model: the
operations bring their own cases and costs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median

import torch
from pilotlight.kernels import check, table
from pilotlight.kernels.cpu import limits, native
from pilotlight.kernels.reference.case import Case, Cost

CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CACHE_BYTES = 128 << 20
"""More than the caches hold."""
COLD_BYTES = 1 << 20
"""A call that moves more finds its operands displaced, as weights are between two steps."""
MIN_ROUNDS = 7
MAX_ROUNDS = 300
MIN_SECONDS = 0.3

EPILOG = """\
GB/s and GFLOP/s come from what a call must at least move and compute. Before each timed call that
moves more than 1 MiB the caches are swept, and the same call on other operands brings the code
back; smaller calls run warm, as they do inside a model. `share` is the least time in which this
machine could have done it over the time it took: read at the bandwidth of those sweeps, and
multiplied at the instruction set's peak, both measured between the calls, since other programs take
their part. Warm calls have none. `ratio` is how many times faster than the reference (PyTorch). All
are medians. The last line is JSON.
"""


@dataclass(frozen=True)
class Machine:
    """What it could do while something was timed."""

    read_bytes_per_s: float
    flops_per_s: float

    def least_seconds(self, cost: Cost) -> float:
        return max(cost.num_bytes / self.read_bytes_per_s, cost.num_flops / self.flops_per_s)


@dataclass(frozen=True)
class Timing:
    op: str
    case: str
    dtype: str
    implementation: str
    microseconds: float
    gigabytes_per_s: float
    gigaflops_per_s: float
    share: float | None
    """Of the machine's limit, None for a call from warm caches."""
    ratio: float
    """Reference time over this time."""


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pilotlight.bench.kernels",
        description=(__doc__ or "").split("\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", choices=sorted(table.TABLE), help="only this operation")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="bfloat16", help="of weights, rows and cache"
    )
    levels = native.levels()
    known = f"here: {', '.join(levels)}" if levels else f"none: {native.missing_reason()}"
    parser.add_argument("--level", choices=levels, help=f"instruction set; {known}")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="default: as many as PyTorch chooses"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON line and nothing else")
    return parser


def measure(op: str, case: Case, dtype: torch.dtype) -> list[Timing]:
    """Check, then time all implementations in turns, so that noise meets them alike."""
    arguments = case.make(CPU, dtype)
    usable = [i for i in table.implementations(op) if i.supported(CPU, dtype)]
    usable = [i for i in usable if i.accepts(*arguments)]
    wanted = check.expected(op, case, CPU, dtype)
    for implementation in usable:
        actual = check.outcome(implementation.function(), case.make(CPU, dtype))
        check.assert_close(actual, wanted, dtype)
    cost: Cost = table.Implementation(op, "reference").module().cost(*arguments)
    calls = [_call(i, arguments) for i in usable]
    if cost.num_bytes > COLD_BYTES:
        others = [_call(i, case.make(CPU, dtype, seed=1)) for i in usable]
        integers = any(isinstance(a, torch.Tensor) and a.dtype is torch.int16 for a in arguments)
        seconds, machine = _cold_medians(calls, others, torch.int16 if integers else dtype)
    else:
        seconds, machine = _warm_medians(calls), None
    return [
        _timing(op, case, dtype, i.name, own, cost, machine, seconds[-1])
        for i, own in zip(usable, seconds, strict=True)
    ]


def _call(
    implementation: table.Implementation, arguments: tuple[object, ...]
) -> Callable[[], None]:
    """As bound kernels call it: asked first, then run."""
    function = implementation.function()
    accepts = getattr(implementation.module(), "accepts", None)

    def call() -> None:
        if accepts is None or accepts(*arguments):
            function(*arguments)

    return call


def _cold_medians(
    calls: list[Callable[[], None]], others: list[Callable[[], None]], dtype: torch.dtype
) -> tuple[list[float], Machine]:
    """Seconds of each call, its operands displaced, and what the machine could do meanwhile."""
    sweep = torch.ones(CACHE_BYTES // 4)
    times: list[list[float]] = [[] for _ in calls]
    reads: list[float] = []
    multiplies: list[float] = []
    for _ in _rounds(len(calls)):
        for call, other, seconds in zip(calls, others, times, strict=True):
            reads.append(limits.read_rate(sweep))
            # After a sweep: torch's threads, where they ran before it, have come to rest.
            multiplies.append(limits.multiply_rate(dtype))
            other()
            seconds.append(_seconds(call))
    return [median(seconds) for seconds in times], Machine(median(reads), median(multiplies))


def _warm_medians(calls: list[Callable[[], None]]) -> list[float]:
    times: list[list[float]] = [[] for _ in calls]
    for _ in _rounds(len(calls)):
        for call, seconds in zip(calls, times, strict=True):
            seconds.append(_seconds(call))
    return [median(seconds) for seconds in times]


def _rounds(num_calls: int) -> Iterator[None]:
    start = time.perf_counter()
    for num_done in range(MAX_ROUNDS):
        if num_done >= MIN_ROUNDS and time.perf_counter() - start > MIN_SECONDS * num_calls:
            return
        yield


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _timing(
    op: str,
    case: Case,
    dtype: torch.dtype,
    name: str,
    seconds: float,
    cost: Cost,
    machine: Machine | None,
    reference_seconds: float,
) -> Timing:
    rates = cost.num_bytes / seconds / 1e9, cost.num_flops / seconds / 1e9
    share = machine.least_seconds(cost) / seconds if machine else None
    ratio = reference_seconds / seconds
    dtype_name = str(dtype).removeprefix("torch.")
    return Timing(op, case.name, dtype_name, name, seconds * 1e6, *rates, share, ratio)


def timings(ops: list[str], dtype: torch.dtype) -> Iterator[Timing]:
    for op in ops:
        for case in table.Implementation(op, "reference").module().cases():
            if case.is_timed and dtype in case.dtypes:
                yield from measure(op, case, dtype)


def _line(t: Timing) -> str:
    rates = f"{t.microseconds:11.1f} {t.gigabytes_per_s:8.2f} {t.gigaflops_per_s:9.1f}"
    share = "-" if t.share is None else f"{t.share:.2f}"
    return f"{t.op:16} {t.case:32} {t.implementation:10} {rates} {share:>6} {t.ratio:7.2f}"


def _print_header(dtype: str) -> None:
    threads = torch.get_num_threads()
    print(f"{dtype}, {threads} threads, level {native.level() or native.missing_reason()}")
    read = max(limits.read_rate(torch.ones(CACHE_BYTES // 4)) for _ in range(MIN_ROUNDS))
    peak = max(limits.multiply_rate(DTYPES[dtype]) for _ in range(MIN_ROUNDS))
    print(f"best of {MIN_ROUNDS}: reads {read / 1e9:.1f} GB/s, multiplies {peak / 1e9:.0f} GFLOP/s")
    names = f"{'us':>11} {'GB/s':>8} {'GFLOP/s':>9} {'share':>6} {'ratio':>7}"
    print(f"{'operation':16} {'case':32} {'way':10} {names}")


def main(argv: list[str] | None = None) -> int:
    arguments = arguments_parser().parse_args(argv)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    native.set_num_threads(torch.get_num_threads())
    if arguments.level:
        native.force_level(arguments.level)
    if not arguments.json:
        _print_header(arguments.dtype)
    results: list[Timing] = []
    ops = [arguments.op] if arguments.op else list(table.TABLE)
    try:
        for timing in timings(ops, DTYPES[arguments.dtype]):
            results.append(timing)
            if not arguments.json:
                print(_line(timing), flush=True)
    except AssertionError as error:
        print(f"a result differs from the reference: {error}", file=sys.stderr)
        return 1
    about = {"threads": torch.get_num_threads(), "level": native.level()}
    print(json.dumps({**about, "results": [asdict(result) for result in results]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
