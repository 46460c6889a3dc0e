"""Machines, processes and a clock that the test moves; a small artefact whose bytes are known."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from pilotlight.weights_cache.arena import BLOCK_BYTES, Arena, TensorSpec
from pilotlight.weights_cache.arena_writer import ArenaWriter
from pilotlight.weights_cache.digests import SETTLE_NS
from pilotlight.weights_cache.liveness import Life, Processes, Surroundings
from pilotlight.weights_cache.store import Store

CHUNK_BYTES = BLOCK_BYTES
ABOUT = {"architecture": "tiny", "source": "nowhere"}


class StillWaiting(BaseException):
    """Somebody waits for one who cannot go on before him: in a test, that is the one he is in."""


class Clock:
    """Moves when somebody pauses, or when the test says so. Waiting for ever is seen."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.num_pauses = 0
        """Of the one who waits now; whoever starts something new may set it back."""

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.num_pauses += 1
        if self.num_pauses > 500:
            raise StillWaiting
        self.now += seconds


@dataclass
class Machine:
    """One kernel: what its processes see of each other."""

    place: str
    clock: Clock
    running: set[tuple[int, int]] = field(default_factory=set)
    num_started: int = 0

    def start(self, pid: int | None = None) -> FakeProcess:
        self.num_started += 1
        process = FakeProcess(self, pid or 100 + self.num_started, self.num_started)
        self.running.add(process.me())
        return process


class FakeProcess(Processes):
    """A process of a machine, until it is killed."""

    def __init__(self, machine: Machine, pid: int, started: int) -> None:
        super().__init__()
        self.place = machine.place
        self._machine = machine
        self._me = (pid, started)

    def me(self) -> tuple[int, int]:
        return self._me

    def seen(self, pid: int, started: int) -> Life:
        return Life.ALIVE if (pid, started) in self._machine.running else Life.DEAD

    def kill(self) -> None:
        self._machine.running.discard(self._me)

    @property
    def world(self) -> Surroundings:
        """For a store. Its heartbeat is the test's to give."""
        return Surroundings(self, self._machine.clock, self._machine.clock.pause, None)


def machine(name: str = "a", clock: Clock | None = None) -> Machine:
    return Machine((name * 16)[:16], clock or Clock())


# ---- an artefact ---------------------------------------------------------------------------------

SHAPES = ((3, 700), (1,), (0,), (5000,), (64, 33))
SPECS = tuple(
    TensorSpec(f"tensor.{index}", "U8", shape, "plain", "only", math.prod(shape))
    for index, shape in enumerate(SHAPES)
)


def contents(seed: int = 0, specs: Sequence[TensorSpec] = SPECS) -> dict[str, bytes]:
    randoms = random.Random(seed)
    return {spec.name: randoms.randbytes(spec.num_bytes) for spec in specs}


def key_of(seed: int) -> str:
    return f"{seed:064x}"


class Builder:
    """Writes the contents of a seed; counts how often, and what was kept from before."""

    def __init__(self, seed: int = 0, specs: Sequence[TensorSpec] = SPECS) -> None:
        self.contents = contents(seed, specs)
        self.num_builds = 0
        self.num_kept = 0

    def __call__(self, writer: ArenaWriter) -> None:
        self.num_builds += 1
        for name, data in self.contents.items():
            if writer.is_written(name):
                self.num_kept += 1
            else:
                writer.write(name, data)


def read_all(arena: Arena) -> dict[str, bytes]:
    """As a loader sees the tensors."""
    data = arena.map()
    return {tensor.name: data[tensor.offset : tensor.end] for tensor in arena.header.tensors}


def settle(store: Store) -> None:
    """As if every digest had been remembered long after its file was changed."""
    for path in (store.root / "digests").iterdir():
        at = path.stat().st_mtime_ns + SETTLE_NS
        os.utime(path, ns=(at, at))
