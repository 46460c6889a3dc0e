"""`pilotlight bench serving`: load on a running server, measured where a client stands.

Knows the command's arguments, how to reach a server and how to print; `load` sends, `latency`
computes. The report goes to standard error, one JSON line to standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import uvloop

from ..engine.errors import ConfigError
from .arrivals import Lengths, Planned, clamped, poisson_times, random_plans, retimed
from .latency import Objectives, first_messages, summary
from .load import Load, Prompts
from .targets import Target, Unreachable, reached
from .traces import Trace, read_trace

DEFAULT_NUM_REQUESTS = 100
PROGRESS_S = 0.5
LATE_S = 0.05
"""A client that sends later than this measures itself too, and the report says so."""
CLEAR_LINE = "\r\x1b[K"
OK, FAILED, MISTAKE = 0, 1, 2

USAGE = "pilotlight bench serving (--rate R | --concurrency N | --trace FILE) [options]"
DESCRIPTION = """\
Send load to a running server and measure it where a client stands: time to the first token (TTFT),
between tokens (ITL) and to the last (E2E), throughput, errors by status and goodput. The report
goes to standard error, one line of JSON to standard output.
"""
EPILOG = """\
examples:
  pilotlight bench serving --rate 4 --num-requests 200
      Poisson arrivals, 4 a second, whether or not the server keeps up
  pilotlight bench serving --concurrency 16 --duration 60 --input-len 64:512 --output-len 128
      16 requests at any time for a minute, prompts of 64 to 512 tokens
  pilotlight bench serving --trace conversation.csv --speed 2 --max-requests 500
      the first 500 requests of a trace, twice as fast as they came
  pilotlight bench serving --rate 8 --slo-ttft-ms 200 --slo-itl-ms 50 --wait-ready 60
      wait for the model, then count the requests that met both objectives
  pilotlight bench serving --openai http://127.0.0.1:8000 --trace conversation.csv --speed 2
      the same load on another engine's server, for comparison

Prompts are random token ids, and answers have exactly the planned length. TTFT and E2E count from
the moment a request was due, so that waiting to be sent counts too (send_lag_s in the JSON).
ITL is the time between tokens; tokens that came in one message share the time since the one before.
An objective on ITL is met by a request whose mean is below it. Lengths beyond the server's context
are cut to fit, and counted. Ctrl-C ends the run and prints what was measured.

A trace is CSV with a header, or JSON lines. Its columns are found by name: TIMESTAMP (a date, or
milliseconds), ContextTokens or input_length, GeneratedTokens or output_length, and others.
With --rate or --concurrency a trace gives only the lengths.

A closed loop (--concurrency) waits for the server and so never shows how requests pile up; an open
one (--rate, --trace) does. Figures of latency are of requests that succeeded.

Exit codes: 0 at least one request succeeded, 1 none did or there is no server, 2 a mistake in what
was asked.
"""


def main(argv: list[str]) -> int:
    try:
        arguments = parse(argv)
        return uvloop.run(run(arguments))
    except ConfigError as error:
        print(f"pilotlight bench serving: {error}", file=sys.stderr)
        return MISTAKE
    except Unreachable as error:
        print(f"pilotlight bench serving: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("pilotlight bench serving: interrupted before any request", file=sys.stderr)
    return FAILED


async def run(arguments: argparse.Namespace) -> int:
    """One load, reported; returns the exit code. Raises ConfigError or Unreachable."""
    trace = _trace(arguments)
    async with reached(arguments) as target:
        prompts = Prompts(target.vocab_size, arguments.shared_prefix_len, arguments.seed)
        deadline_s, duration_s = arguments.deadline, arguments.duration
        load = Load(target.stub, prompts, deadline_s=deadline_s, duration_s=duration_s)
        plans = (clamped(planned, target.context_len) for planned in _plans(arguments, trace))
        is_interrupted = await _run_to_end(load, plans, arguments.concurrency)
    result = _result(arguments, target, load, is_interrupted)
    print(_table(result, first_messages(load.outcomes), target.context_len), file=sys.stderr)
    print(json.dumps(result), flush=True)
    return OK if result["num_ok"] else FAILED


# ---- the command's words ---------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises ConfigError for words that contradict each other or lie out of range."""
    top = argparse.ArgumentParser(
        prog="pilotlight bench serving",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_server(top.add_argument_group("server"))
    _add_arrivals(top.add_argument_group("arrivals"))
    _add_lengths(top.add_argument_group("requests"))
    _add_objectives(top.add_argument_group("objectives"))
    arguments = top.parse_args(argv)
    _check(arguments)
    return arguments


def _add_server(group: Any) -> None:
    add = group.add_argument
    add("--target", default="127.0.0.1:50051", metavar="HOST:PORT", help="(default: %(default)s)")
    add("--openai", metavar="URL", help="instead: a server with OpenAI's HTTP interface")
    add("--openai-vocab-size", type=int, default=32000, metavar="N",
        help="prompts have ids below this: it does not tell (default: %(default)s)")  # fmt: skip
    add("--openai-context-len", type=int, default=4096, metavar="TOKENS",
        help="if it does not tell that either (default: %(default)s)")  # fmt: skip
    add("--wait-ready", type=float, metavar="SECONDS", help="wait this long for readiness first")
    add("--deadline", type=float, metavar="SECONDS", help="of each request (default: none)")


def _add_arrivals(group: Any) -> None:
    add = group.add_argument
    add("--rate", type=float, metavar="R", help="Poisson arrivals, R a second; inf: all at once")
    add("--concurrency", type=int, metavar="N", help="N requests at any time; one that has ended "
        "makes room for the next")  # fmt: skip
    add("--trace", type=Path, metavar="FILE", help="lengths and, unless --rate or --concurrency "
        "say otherwise, times of real traffic")  # fmt: skip
    add("--speed", type=float, metavar="X", help="replay the trace X times as fast (default: 1)")
    add("--num-requests", "--max-requests", type=int, metavar="N", dest="num_requests",
        help=f"end after N (default: {DEFAULT_NUM_REQUESTS}, or the whole trace, or no end with "
        "--duration)")  # fmt: skip
    add("--duration", type=float, metavar="SECONDS", help="send nothing new after this")


def _add_lengths(group: Any) -> None:
    add = group.add_argument
    add("--input-len", type=_lengths, metavar="N|N:M", help="prompt tokens (default: 128)")
    add("--output-len", type=_lengths, metavar="N|N:M", help="answer tokens (default: 64)")
    add("--shared-prefix-len", type=int, default=0, metavar="N",
        help="first tokens that all prompts share (default: 0)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="same seed, same load (default: 0)")


def _add_objectives(group: Any) -> None:
    add = group.add_argument
    add("--slo-ttft-ms", type=float, metavar="MS", help="most time to the first token")
    add("--slo-itl-ms", type=float, metavar="MS", help="most mean time between tokens")


def _lengths(text: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except ValueError:
        message = f"{text!r} is neither a length like 128 nor a range like 64:512"
        raise argparse.ArgumentTypeError(message) from None


def _check(arguments: argparse.Namespace) -> None:
    positive = ("rate", "concurrency", "speed", "num_requests", "duration", "deadline",
                "wait_ready", "slo_ttft_ms", "slo_itl_ms")  # fmt: skip
    for name in positive:
        value = getattr(arguments, name)
        is_at_once = name == "rate" and value == math.inf
        if not (value is None or is_at_once or 0 < value < math.inf):
            raise ConfigError(f"{_flag(name)} is {value}: it must be a number above 0")
    for name in ("shared_prefix_len", "seed"):
        value = getattr(arguments, name)
        if value < 0:
            raise ConfigError(f"{_flag(name)} is {value}: it must be at least 0")
    if arguments.rate is not None and arguments.concurrency is not None:
        raise ConfigError("--rate and --concurrency exclude each other: an open or a closed loop")
    if arguments.trace is None:
        _check_without_trace(arguments)
    else:
        _check_with_trace(arguments)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_without_trace(arguments: argparse.Namespace) -> None:
    if arguments.speed is not None:
        raise ConfigError("--speed belongs to --trace")
    if arguments.rate is None and arguments.concurrency is None:
        raise ConfigError("say how requests arrive: --rate, --concurrency or --trace")
    if arguments.rate == math.inf and arguments.num_requests is None:
        raise ConfigError("--rate inf sends everything at once: say how many with --num-requests")


def _check_with_trace(arguments: argparse.Namespace) -> None:
    if arguments.input_len or arguments.output_len:
        raise ConfigError("--trace brings the lengths: leave out --input-len and --output-len")
    if arguments.speed is not None and (arguments.rate or arguments.concurrency):
        raise ConfigError("--speed is of the trace's times, which --rate and --concurrency replace")


# ---- the load --------------------------------------------------------------------------------


def _trace(arguments: argparse.Namespace) -> Trace | None:
    if arguments.trace is None:
        return None
    trace = read_trace(arguments.trace).faster(arguments.speed or 1.0)
    if not (trace.has_times or arguments.rate or arguments.concurrency):
        raise ConfigError(f"trace {arguments.trace} has no times: give --rate or --concurrency")
    return trace


def _plans(arguments: argparse.Namespace, trace: Trace | None) -> Iterable[Planned]:
    """What will be sent, as long as `--num-requests` or the trace; endless with `--duration`."""
    rate = math.inf if arguments.rate is None else arguments.rate
    times = poisson_times(rate, arguments.seed)
    if trace is None:
        default = Lengths(128, 128), Lengths(64, 64)
        inputs, outputs = arguments.input_len or default[0], arguments.output_len or default[1]
        plans: Iterable[Planned] = random_plans(times, inputs, outputs, arguments.seed)
    else:
        plans = trace.plans if arguments.rate is None else retimed(trace.plans, times)
    return itertools.islice(plans, _most(arguments, trace))


def _most(arguments: argparse.Namespace, trace: Trace | None) -> int | None:
    if arguments.num_requests is not None or trace is not None or arguments.duration:
        num_requests: int | None = arguments.num_requests
        return num_requests
    return DEFAULT_NUM_REQUESTS


async def _run_to_end(load: Load, plans: Iterable[Planned], concurrency: int | None) -> bool:
    """Whether the user ended it. What was measured until then counts."""
    async with _progress(load):
        try:
            await load.run(plans, concurrency)
        except asyncio.CancelledError:
            # uvloop.run cancels on Ctrl-C, once: a second ends the report too.
            return True
    return False


@asynccontextmanager
async def _progress(load: Load) -> AsyncIterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    task = asyncio.create_task(_tell(load))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        print(CLEAR_LINE, end="", file=sys.stderr)


async def _tell(load: Load) -> NoReturn:
    while True:
        line = f"{load.num_ended} of {len(load.outcomes)} sent requests have ended"
        print(f"{CLEAR_LINE}pilotlight: {line}", end="", file=sys.stderr, flush=True)
        await asyncio.sleep(PROGRESS_S)


# ---- the report ------------------------------------------------------------------------------


def _result(
    arguments: argparse.Namespace,
    target: Target,
    load: Load,
    is_interrupted: bool,
) -> dict[str, Any]:
    objectives = Objectives(arguments.slo_ttft_ms, arguments.slo_itl_ms)
    return {
        "model": target.model,
        "target": target.name,
        "rate": None if arguments.rate == math.inf else arguments.rate,
        "concurrency": arguments.concurrency,
        "trace": arguments.trace.name if arguments.trace else None,
        "seed": arguments.seed,
        "is_interrupted": is_interrupted,
        **summary(load.outcomes, load.began_s, objectives),
    }


COLUMNS = ("p50", "p90", "p95", "p99", "max")


@dataclass(frozen=True, slots=True)
class _Row:
    """A distribution as a line of milliseconds."""

    title: str
    name: str

    def line(self, result: dict[str, Any]) -> str:
        values = result[self.name]
        cells = (values[name] for name in COLUMNS)
        shown = ("-" if value is None else f"{value * 1000:.1f}" for value in cells)
        return f"  {self.title:<22}" + "".join(f"{cell:>10}" for cell in shown)


ROWS = (
    _Row("first token, ms", "ttft_s"),
    _Row("between tokens, ms", "itl_s"),
    _Row("whole answer, ms", "e2e_s"),
)


def _table(result: dict[str, Any], messages: dict[str, str], context_len: int) -> str:
    ok, total = result["num_ok"], result["num_requests"]
    line = f"{ok} of {total} requests succeeded in {result['duration_s']:.1f} s"
    lines = [f"{line}, then interrupted" if result["is_interrupted"] else line]
    if ok:
        lines += _figures(result)
    if result["num_clamped"]:
        count = result["num_clamped"]
        lines.append(f"  {count} x lengths changed to fit the context (1 to {context_len} tokens)")
    if (late_s := result["send_lag_s"]["p99"] or 0.0) > LATE_S:
        lines.append(f"  this client fell behind: 1 in 100 was sent {late_s * 1000:.0f} ms late")
    for code, count in result["errors"].items():
        lines.append(f"  {count} x {code}: {' '.join(messages[code].split())}")
    return "\n".join(lines)


def _figures(result: dict[str, Any]) -> list[str]:
    lines = [
        f"  {result['requests_per_s']:.2f} requests/s, "
        f"{result['output_tokens_per_s']:.1f} output tokens/s, "
        f"{result['total_tokens_per_s']:.1f} tokens/s in all",
        " " * 24 + "".join(f"{name:>10}" for name in COLUMNS),
        *(row.line(result) for row in ROWS),
    ]
    if result["goodput_requests_per_s"] is not None:
        lines.append(f"  goodput {result['goodput_requests_per_s']:.2f} requests/s")
    return lines
