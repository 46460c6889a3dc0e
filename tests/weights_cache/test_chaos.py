"""Thousands of injected faults: a good artefact or a typed error, never bad bytes, never the loss
of what is leased, and nothing left to clean up by hand.

Every fault is one call of one process that fails in one way, all calls in turn, so the suite is
the same at every run; `storms` draw theirs from a seed.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from pilotlight.tests.weights_cache.chaos import (
    KEY,
    Process,
    Stage,
    Tally,
    check_held,
    collect,
    damaged,
    fetch,
    fetched,
    forget,
    half_built,
    littered,
    nothing,
    published,
    remove,
    serve,
    serve_twice,
)
from pilotlight.tests.weights_cache.faulty_files import (
    KILLS,
    Fault,
    FaultyFileSystem,
    Kind,
    is_hit_by,
)
from pilotlight.weights_cache.arena import read_arena
from pilotlight.weights_cache.artefacts import LeasedArena
from pilotlight.weights_cache.verify import verify_chunks

SCENES: dict[str, tuple[Callable[[Path], None], Callable[[Process], None]]] = {
    "the first boot": (nothing, serve),
    "a later boot": (published, serve),
    "a boot that goes on building": (half_built, serve),
    "a boot that finds damage": (damaged, serve_twice),
    "eviction": (published, collect),
    "removal": (published, remove),
    "a fetch": (nothing, fetch),
    "a source forgotten": (fetched, forget),
    "garbage": (littered, collect),
}
FETCHING = {"a fetch", "a source forgotten", "garbage"}
STRIDES = {"garbage": 3}
"""Of many calls that are the same call for another file, not every one."""
KINDS = tuple(kind for kind in Kind if kind is not Kind.RUN)
EXPECTED = {"done", "killed", "CacheError", "NotEnoughDisk", "BadArtefact"}
WAITING = "waiting"
"""For the process inside which it runs; only where one comes in."""


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    tally = Tally()
    yield tally
    print(f"\nchaos: {tally.num_faults} faults, {tally.num_interruptions} interruptions;", end=" ")
    print(dict(sorted(tally.outcomes.items())))
    assert tally.outcomes.keys() <= {*EXPECTED, WAITING}


@pytest.fixture
def place() -> Iterator[Path]:
    """In memory where there is such a place: thousands of small roots are made."""
    memory = Path("/dev/shm")
    folder = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="pilotlight-chaos-", dir=folder) as name:
        yield Path(name)


@pytest.fixture
def template(place: Path) -> Path:
    return place / "template"


@pytest.mark.parametrize("scene", SCENES)
def test_every_call_fails_in_every_way(
    place: Path, template: Path, tally: Tally, scene: str
) -> None:
    prepare, act = SCENES[scene]
    prepare(template)
    for is_held in (False, True):
        calls = calls_of(Stage(template, place / "root"), act, is_held=is_held)
        for at, call in list(enumerate(calls))[:: STRIDES.get(scene, 1)]:
            kinds = [kind for kind in KINDS if is_hit_by(kind, call)]
            for kind in kinds[is_held::2]:  # each with and without a holder, one call or the next
                stage = Stage(template, place / "root")
                process = stage.start(Fault(kind, at, seed=at))
                with stage.held(is_held=is_held):
                    outcome = process.run(act)
                assert outcome in EXPECTED
                assert (outcome == "killed") == process.files.is_dead
                assert process.files.num_injected >= 1
                tally.add(process, outcome)
                if kind is Kind.POWER_LOSS and prepare is not damaged:
                    check_published(stage.root / "arenas" / KEY / "arena.bin")
                stage.recover(
                    process,
                    is_there=at % 4 >= 2 and kind in KILLS,
                    with_fetch=scene in FETCHING,
                )


def check_published(path: Path) -> None:
    """Whatever lies there was on the disk before it came there."""
    if path.exists():
        with read_arena(path) as arena:
            assert verify_chunks(arena)


def calls_of(stage: Stage, act: Callable[[Process], None], *, is_held: bool) -> list[str]:
    """What it calls when nothing fails."""
    process = stage.start(Fault(Kind.RUN, at=-1))
    with stage.held(is_held=is_held):
        assert process.run(act) == "done"
    assert isinstance(process.files, FaultyFileSystem)
    process.files.close_all()
    return process.files.calls


# ---- others in between ---------------------------------------------------------------------------


def hold(process: Process, held: list[LeasedArena]) -> None:
    leased = process.store.find_arena(KEY)
    if leased is not None:
        held.append(leased)


@pytest.mark.parametrize("other", [collect, serve, hold])
@pytest.mark.parametrize("scene", SCENES)
def test_another_process_comes_in_between_calls(
    place: Path,
    template: Path,
    tally: Tally,
    scene: str,
    other: Callable[..., None],
) -> None:
    """Eviction while loading, loading while evicting, and all other pairs; every second call."""
    prepare, act = SCENES[scene]
    prepare(template)
    calls = calls_of(Stage(template, place / "root"), act, is_held=False)
    for at in range(other is serve, len(calls), 2 * STRIDES.get(scene, 1)):
        stage = Stage(template, place / "root")
        held: list[LeasedArena] = []
        second = stage.start()

        def come_in(second: Process = second, held: list[LeasedArena] = held) -> None:
            second.run(partial(hold, held=held) if other is hold else other)

        process = stage.start(Fault(Kind.RUN, at, run=come_in))
        outcome = process.run(act)
        assert outcome in EXPECTED - {"killed"}
        tally.add(process, outcome)
        for leased in held:
            check_held(leased)
            leased.close()
        stage.recover(process, with_fetch=scene in FETCHING)
        second.files.close_all()


KILLED_FOR_REAL = """
import os, random, signal, sys
from pathlib import Path
from pilotlight.tests.weights_cache import chaos
from pilotlight.tests.weights_cache.faulty_files import QuickFileSystem
from pilotlight.weights_cache.store import Store

randoms = random.Random(7)
root = Path(sys.argv[1])

class Ticking(QuickFileSystem):
    def list(self, folder):
        os.write(write_end, b".")
        return super().list(folder)
    def open(self, path, flags):
        os.write(write_end, b".")
        return super().open(path, flags)
    def rename(self, source, target):
        super().rename(source, target)
        os.write(write_end, b".")
    def unlink(self, path, missing_ok=False):
        os.write(write_end, b".")
        super().unlink(path, missing_ok)

def work(act):
    process = chaos.Process.__new__(chaos.Process)
    process.root, process.files = root, Ticking()
    process._store = Store(root, process.files)
    while True:
        act(process)

num_killed = 0
for _ in range(int(sys.argv[2])):
    read_end, write_end = os.pipe()
    pids = []
    for act in (chaos.serve, chaos.serve_twice, chaos.collect):
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            try:
                work(act)
            finally:
                os._exit(1)
        pids.append(pid)
    os.close(write_end)
    for pid in randoms.sample(pids, 3):
        for _ in range(randoms.randrange(1, 120)):
            os.read(read_end, 1)
        os.kill(pid, signal.SIGKILL)
        num_killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    os.close(read_end)
print(num_killed)
"""


def test_real_processes_are_killed_for_real(place: Path) -> None:
    """Two that boot and one that evicts, over and over; each is killed at some call."""
    num_rounds = 40
    command = [sys.executable, "-c", KILLED_FOR_REAL, str(place / "root"), str(num_rounds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"{3 * num_rounds}\n"), done.stderr
    stage = Stage(place / "root", place / "again")
    stage.recover(stage.start())


@pytest.mark.parametrize("seed", range(80))
def test_storms(place: Path, template: Path, tally: Tally, seed: int) -> None:
    """Processes of two machines, one after the other and inside each other, most of them failing;
    one holds what it found, all the time."""
    randoms = random.Random(seed)
    acts = (serve, serve_twice, collect, remove, fetch, forget)
    littered(template)
    stage = Stage(template, place / "root")
    processes: list[Process] = []
    held: list[LeasedArena] = []

    def fault(depth: int) -> Fault:
        kind = randoms.choice(KINDS if depth else (*KINDS, *[Kind.RUN] * 6))
        return Fault(kind, randoms.randrange(90), randoms.random(), lambda: step(depth + 1))  # type: ignore[arg-type]

    def step(depth: int = 0) -> None:
        process = stage.start(fault(depth), is_there=randoms.random() < 0.3)
        processes.append(process)
        outcome = process.run(randoms.choice(acts))
        assert outcome in (EXPECTED if depth == 0 else {*EXPECTED, WAITING})
        tally.add(process, outcome)
        process.live_on()
        for leased in held:
            check_held(leased)

    for number in range(25):
        step()
        if number % 8 == 0:
            hold(stage.start(), held)
    for leased in held:
        check_held(leased)
        leased.close()
    for process in processes:
        process.live_on()
        process.files.close_all()
    stage.recover(processes[-1])
