"""`pilotlight bench loader`: an artefact's way to a device, stage by stage, and its limits.

Knows the reader, the ring and a device's copies; knows no engine and no server.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..engine.errors import ConfigError
from ..engine.host_memory import available_host_bytes
from ..engine.models.artefact import build
from ..server.config import DEMO_MODEL, cache_root
from ..weights_cache.arena import Arena, read_arena
from ..weights_cache.reader import native
from ..weights_cache.reader.direct import reads_direct
from ..weights_cache.reader.readers import Reader, start_reader
from ..weights_cache.reader.ring import Ring, num_slots
from ..weights_cache.store import Store
from ..weights_cache.stream.copiers import copier_for
from ..weights_cache.stream.device import DeviceArena
from .startup_cold import drop_pages
from .startup_limits import read_rate

EPILOG = """\
stages, in bytes per second, medians:
  limit.read      the same file by one thread's plain reads, with pages as the others find them
  limit.copy      one ring's bytes to the device again and again: its copy engine (CUDA), or memory
  read            the reader alone: chunks into the ring, thrown away
  arrive          what a boot does: read, hash, copy to the device, wait for the last byte

share.read and share.arrive are read over limit.read, and arrive over the smaller of both limits.
With --drop-cache each run begins with no page of the file in memory. The last line is JSON.

examples:
  pilotlight bench loader MODEL
  pilotlight bench loader MODEL --drop-cache --direct on
"""


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.repeat < 1:
        raise ConfigError("--repeat: at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store = Store(Path(arguments.cache or cache_root()))
    path = build(store, Path(arguments.model), device.type).path
    with read_arena(path) as arena:
        result = measure(arena, device, arguments)
    print(table(result), file=sys.stderr)
    print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pilotlight bench loader",
        description="Measure how an artefact's bytes get to the device.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", default=str(DEMO_MODEL), metavar="MODEL",
        help="checkpoint folder (default: the built-in model)")  # fmt: skip
    add("--cache", metavar="DIR", help="the weights cache (default: as `serve`)")
    add("--repeat", type=int, default=5, metavar="N", help="runs of each (default: %(default)s)")
    add("--drop-cache", action="store_true", help="begin each run with no page in memory")
    add("--direct", choices=("auto", "on", "off"), default="auto",
        help="past the page cache; auto: as a boot would find out (default)")  # fmt: skip
    return parser


def measure(arena: Arena, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """Stages alternate, so that a busy machine is busy for all of them."""

    def begin() -> None:
        if arguments.drop_cache:
            drop_pages([arena.path])

    begin()
    is_direct = reads_direct(arena) if arguments.direct == "auto" else arguments.direct == "on"
    stages: dict[str, Callable[[], float]] = {
        "limit.read": lambda: read_rate(arena.path, 1),
        "read": lambda: _rate(arena, lambda: _drained(_reader(arena, is_direct))),
        "arrive": lambda: _rate(arena, lambda: _arrived(arena, device, is_direct)),
    }
    rates: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(arguments.repeat):
        for name, stage in stages.items():
            begin()
            rates[name].append(stage())
    rates["limit.copy"] = [copy_rate(arena, device) for _ in range(arguments.repeat)]
    medians = {name: statistics.median(found) for name, found in rates.items()}
    least = min(medians["limit.read"], medians["limit.copy"])
    return {
        "artefact": str(arena.path),
        "num_bytes": arena.num_bytes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "is_native": native.library() is not None,
        "is_direct": is_direct,
        "is_cold": arguments.drop_cache,
        "num_slots": _slots(arena),
        "bytes_per_s": {name: round(rate) for name, rate in medians.items()},
        "spread": {name: [round(min(f)), round(max(f))] for name, f in rates.items()},
        "share.read": round(medians["read"] / medians["limit.read"], 3),
        "share.arrive": round(medians["arrive"] / least, 3),
    }


def _slots(arena: Arena) -> int:
    return num_slots(arena.num_bytes, arena.header.chunk_bytes, available_host_bytes())


def _reader(arena: Arena, is_direct: bool) -> Reader:
    return start_reader(arena, Ring(_slots(arena), arena.header.chunk_bytes), is_direct)


def _drained(reader: Reader) -> None:
    while (filled := reader.take()) is not None:
        reader.release(filled.slot)
    reader.close()


def _arrived(arena: Arena, device: torch.device, is_direct: bool) -> None:
    DeviceArena(arena, _reader(arena, is_direct), copier_for(device)).finish()


def _rate(arena: Arena, work: Callable[[], None]) -> float:
    began_s = time.monotonic()
    work()
    return arena.num_bytes / (time.monotonic() - began_s)


def copy_rate(arena: Arena, device: torch.device) -> float:
    """One ring's bytes, several times, to where they then are: bytes per second."""
    chunk_bytes = arena.header.chunk_bytes
    ring = Ring(_slots(arena), chunk_bytes)
    copier = copier_for(device)
    copier.open(ring, ring.num_slots * chunk_bytes)
    spent_s = []
    for _ in range(4):
        began_s = time.monotonic()
        for slot in range(ring.num_slots):
            fence = copier.copy(ring.start(slot), chunk_bytes, slot * chunk_bytes)
        fence.wait()
        spent_s.append(time.monotonic() - began_s)
    copier.close()
    # The first brings memory in.
    return ring.num_slots * chunk_bytes / min(spent_s[1:])


def table(result: dict[str, Any]) -> str:
    lines = [
        f"  {result['num_bytes'] / 1e6:.1f} MB to {result['device']}, {result['num_slots']} slots, "
        f"{'C++' if result['is_native'] else 'Python'} threads, "
        f"{'past' if result['is_direct'] else 'by'} the page cache"
    ]
    for name, rate in result["bytes_per_s"].items():
        low, high = result["spread"][name]
        lines.append(f"  {name:<12}{rate / 1e9:8.2f} GB/s  ({low / 1e9:.2f} to {high / 1e9:.2f})")
    lines += [f"  {name:<14}{result[name]:6.2f}" for name in ("share.read", "share.arrive")]
    return "\n".join(lines)
