"""`pilotlight bench startup`: process start to open ports, to readiness, to the first token.

Knows the command's arguments, in which order starts follow each other, and how to print. What a
start is, what the machine could do at best and what others need is measured by the files beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..engine.errors import ConfigError
from ..server.config import DEMO_MODEL
from . import startup_picture
from .startup_cold import drop_pages
from .startup_figures import Start, cold_ratio, paired_ratio, summaries
from .startup_limits import measure_limits
from .startup_peers import PEERS, chosen_peers, command_of, time_peer
from .startup_runs import time_standby, time_start, warm_up

OURS, COLD, STANDBY = "pilotlight", "cold", "standby"
FIRST, DIRECT = "first boot", "direct load"
INTERRUPTED = 130
EPILOG = """\
examples:
  pilotlight bench startup MODEL
      one start that makes the artefact, then 7 that are measured
  pilotlight bench startup MODEL --drop-cache --standby
      also with no page of the weights in memory, and from a server that stands by
  pilotlight bench startup MODEL --first-boot
      also with an empty cache, whose artefact is written behind, and with no cache at all
  pilotlight bench startup MODEL --vs transformers,vllm --peer-python vllm=/opt/vllm/bin/python \\
      --peer-repeat 3 --picture startup.png

Times are seconds since the moment before the process was spawned, as a gRPC client on this machine
sees them. Starts of different kinds alternate, so that a busy machine is busy for all of them.
With --drop-cache every page is dropped and mincore(2) asked whether it is gone; a start that would
not be cold ends the command. cold.ratio is the cold first token over reading all bytes once, at the
file's cold sequential rate, and a warm first token.

Interrupted, it reports what was measured until then; a peer that fails is left out.
limits.floor_s is what no start avoids: the interpreter and torch's import, or the bytes from page
cache if that takes longer. attributed is the part of the boot that the phases of /startup explain.
"""


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.repeat < 1 or arguments.peer_repeat < 1:
        raise ConfigError("--repeat and --peer-repeat: at least 1")
    if arguments.picture:
        startup_picture.check_can_draw()
    peers = peer_commands(arguments)
    flags = ["--cache", arguments.cache] if arguments.cache else []
    artefact = warm_up(arguments.model, flags, say)
    weights = sorted(Path(arguments.model).glob("*.safetensors"))
    files = [*([artefact] if artefact else []), *weights]
    say("limits of this machine")
    limits = measure_limits(files[0])
    kinds, resident = kinds_of_start(arguments, flags, peers, files)
    counts = {name: arguments.peer_repeat if name in PEERS else arguments.repeat for name in kinds}
    starts: dict[str, list[Start]] = {name: [] for name in kinds}
    was_ended = alternate(kinds, counts, starts)
    starts = {name: all_ for name, all_ in starts.items() if all_}
    if OURS not in starts:
        return INTERRUPTED
    result = report(starts, limits, resident)
    result["model"], result["artefact"] = arguments.model, str(artefact or "")
    _write(result, starts, arguments)
    return INTERRUPTED if was_ended else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pilotlight bench startup",
        description="Start the server again and again and measure how long its first token takes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", default=str(DEMO_MODEL), metavar="MODEL",
        help="checkpoint folder (default: the built-in model)")  # fmt: skip
    add("--repeat", type=int, default=7, metavar="N", help="measured starts (default: %(default)s)")
    add("--cache", metavar="DIR", help="the server's weights cache (default: as `serve`)")
    add("--drop-cache", action="store_true", help="also starts with no weights in memory")
    add("--first-boot", action="store_true", help="also with an empty cache, and without any")
    add("--standby", action="store_true", help="also LoadModel to first token, from standby")
    add("--vs", default="", metavar="PEERS", help=f"also, in turn: {','.join(PEERS)}")
    add("--peer-python", action="append", default=[], metavar="PEER=PYTHON",
        help="interpreter that has the peer (default: python3 on PATH)")  # fmt: skip
    add("--peer-repeat", type=int, default=3, metavar="N",
        help="starts of each peer (default: %(default)s)")  # fmt: skip
    add("--picture", type=Path, metavar="FILE.png", help="timelines above each other; extra: bench")
    add("--json", type=Path, metavar="FILE", help="the JSON line into this file too")
    return parser


def say(text: str) -> None:
    print(f"pilotlight: {text}", file=sys.stderr, flush=True)


# ---- what is started, in which order -----------------------------------------------------------


def peer_commands(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The command line of each peer; ConfigError before anything is measured."""
    pairs = [pair.partition("=") for pair in arguments.peer_python]
    for name, _, python in pairs:
        if name not in PEERS or not python:
            raise ConfigError(f"--peer-python {name}: not PEER=PYTHON with PEER of {[*PEERS]}")
    pythons = {name: python for name, _, python in pairs}
    model = Path(arguments.model)
    return {p.name: command_of(p, pythons, model) for p in chosen_peers(arguments.vs)}


def kinds_of_start(
    arguments: argparse.Namespace,
    flags: list[str],
    peers: dict[str, list[str]],
    files: list[Path],
) -> tuple[dict[str, Callable[[], Start]], list[float]]:
    """What to start by name; the list takes, for each cold start, the fraction left in memory."""
    resident: list[float] = []

    def cold_start() -> Start:
        resident.append(drop_pages(files))
        say(f"dropped: {resident[-1]:.3%} of the pages are in memory")
        return time_start(arguments.model, flags)

    kinds: dict[str, Callable[[], Start]] = {OURS: lambda: time_start(arguments.model, flags)}
    if arguments.drop_cache:
        kinds[COLD] = cold_start
    if arguments.first_boot:
        kinds[FIRST] = lambda: _first_boot(arguments.model)
        kinds[DIRECT] = lambda: time_start(arguments.model, ["--cache", "off"])
    if arguments.standby:
        kinds[STANDBY] = lambda: time_standby(arguments.model, flags)
    for name, command in peers.items():
        kinds[name] = lambda command=command: time_peer(command)  # type: ignore[misc]
    return kinds, resident


def alternate(
    kinds: dict[str, Callable[[], Start]], counts: dict[str, int], starts: dict[str, list[Start]]
) -> bool:
    """Rounds in which each kind starts once; `starts` takes them. True: it was interrupted.

    In another order each round: what a start finds of memory depends on the one before it.
    """
    failed: set[str] = set()
    try:
        for number in range(max(counts.values())):
            for name in random.Random(number).sample(list(kinds), len(kinds)):
                if number < counts[name] and name not in failed:
                    _start(name, kinds[name], starts[name], counts[name], failed)
    except KeyboardInterrupt:
        say("interrupted: this is what was measured until now")
        return True
    return False


def _start(
    name: str, kind: Callable[[], Start], starts: list[Start], count: int, failed: set[str]
) -> None:
    try:
        starts.append(kind())
    except ConfigError as error:
        if name not in PEERS:
            raise
        failed.add(name)
        say(f"{name} is left out from here on: {error}")
        return
    first_s = starts[-1].moments["first_token_s"]
    say(f"{len(starts)}/{count} {name:<14}first token {first_s:8.3f} s")


def _first_boot(model: str) -> Start:
    """Nothing of any earlier boot is in the cache."""
    with TemporaryDirectory(prefix="pilotlight-first-boot-") as cache:
        return time_start(model, ["--cache", cache])


# ---- what came of it ----------------------------------------------------------------------------


def report(
    starts: dict[str, list[Start]], limits: dict[str, Any], resident: list[float]
) -> dict[str, Any]:
    """The JSON line."""
    ours = starts[OURS]
    result = summaries(ours) | {"num_starts": len(ours), "limits": limits}
    warm_s = result["first_token_s"]["median"]
    result["vs"] = {
        n: summaries(s) | {"num_starts": len(s)} for n, s in starts.items() if n in PEERS
    }
    result["ratios"] = {n: paired_ratio(starts[n], ours) for n in result["vs"]}
    result["ratios"]["floor"] = round(warm_s / limits["floor_s"], 3)
    if STANDBY in starts:
        result["standby"] = summaries(starts[STANDBY])
    for name in (FIRST, DIRECT):
        if name in starts:
            result[name] = summaries(starts[name])
    if FIRST in starts and DIRECT in starts:
        ratio = paired_ratio(starts[FIRST], starts[DIRECT], "ready_s")
        result["ratios"]["first boot, of direct"] = ratio
    if COLD in starts:
        cold = summaries(starts[COLD])
        rate, num_bytes = limits["cold_read_1_bytes_per_s"], limits["num_bytes"]
        ratio = cold_ratio(cold["first_token_s"]["median"], warm_s, num_bytes, rate)
        facts = {"resident_before": max(resident), "read_rate": rate, "num_bytes": num_bytes}
        result["cold"] = cold | facts | {"ratio": ratio}
    return result


def table(result: dict[str, Any]) -> str:
    """Moments of each kind, then our phases, then the limits."""
    kinds = {
        OURS: result,
        **{n: result[n] for n in (COLD, FIRST, DIRECT, STANDBY) if n in result},
        **result["vs"],
    }
    lines = [f"  {'':<30}{'median':>9}{'min':>9}{'max':>9}  s"]
    for kind, figures in kinds.items():
        for name in ("ports_open_s", "ready_s", "first_token_s"):
            if name in figures:
                f, label = figures[name], f"{kind} {name.removesuffix('_s').replace('_', ' ')}"
                lines.append(f"  {label:<30}{f['median']:9.3f}{f['min']:9.3f}{f['max']:9.3f}")
    for name, seconds in result["phases"].items():
        lines.append(f"  phase {name:<24}{seconds:9.3f}")
    lines.append(f"  {'explained by phases':<30}{result['attributed']:9.1%}")
    for name, value in result["limits"].items():
        shown = f"{value / 1e9:9.3f} GB/s" if name.endswith("_per_s") else f"{value:9.4g}"
        lines.append(f"  limit {name.removesuffix('_bytes_per_s'):<24}{shown}")
    lines += [f"  times {name:<24}{ratio:9.2f}" for name, ratio in result["ratios"].items()]
    if COLD in result:
        lines.append(f"  {'cold, of read and warm':<30}{result[COLD]['ratio']:9.2f}")
    return "\n".join(lines)


def _write(
    result: dict[str, Any], starts: dict[str, list[Start]], arguments: argparse.Namespace
) -> None:
    print(table(result), file=sys.stderr, flush=True)
    if arguments.picture:
        startup_picture.draw(
            {name: _middle(all_) for name, all_ in starts.items()}, arguments.picture
        )
    line = json.dumps(result)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    print(line)


def _middle(starts: list[Start]) -> Start:
    """The start with the median first token: its phases happened together."""
    return sorted(starts, key=lambda start: start.moments["first_token_s"])[len(starts) // 2]
