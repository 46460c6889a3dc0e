"""Thousands of injected faults: a good artefact or a typed error, never bad bytes, never the loss
of what is leased, and nothing left to clean up by hand.

Every fault is one call of one process that fails in one way, all calls in turn, so the suite is
the same at every run; `storms` draw theirs from a seed.
"""

from __future__ import annotations

import os
import random
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
from pilotlight.weights_cache.artefacts import LeasedArena

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
KINDS = tuple(kind for kind in Kind if kind is not Kind.RUN)
EXPECTED = {"done", "killed", "CacheError", "NotEnoughDisk", "BadArtefact"}
WAITING = "waiting"
"""For the process inside which it runs; only where one comes in."""


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    tally = Tally()
    yield tally
    print(f"\nchaos: {tally.num_faults} faults; {dict(sorted(tally.outcomes.items()))}")
    assert tally.outcomes.keys() <= {*EXPECTED, WAITING}


@pytest.fixture
def place() -> Iterator[Path]:
    """In memory where there is such a place: thousands of small roots are made."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
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
    for kind in KINDS:
        for at, call in enumerate(calls_of(template, place / "root", act)):
            if not is_hit_by(kind, call):
                continue
            stage = Stage(template, place / "root")
            process = stage.start(Fault(kind, at, seed=at))
            with stage.held(is_held=at % 2 == 1):
                outcome = process.run(act)
            assert outcome in EXPECTED
            assert (outcome == "killed") == process.files.is_dead
            assert process.files.num_injected >= 1
            tally.add(process, outcome)
            stage.recover(process, is_there=at % 4 >= 2 and kind in KILLS)


def calls_of(template: Path, root: Path, act: Callable[[Process], None]) -> list[str]:
    """What it calls when nothing fails."""
    process = Stage(template, root).start(Fault(Kind.RUN, at=-1))
    assert process.run(act) == "done"
    assert isinstance(process.files, FaultyFileSystem)
    process.files.close_all()
    return process.files.calls


# ---- others in between ---------------------------------------------------------------------------


def hold(process: Process, held: list[LeasedArena]) -> None:
    leased = process.store.find_arena(KEY)
    if leased is not None:
        held.append(leased)


@pytest.mark.parametrize("other", [collect, remove, serve, hold])
@pytest.mark.parametrize("scene", SCENES)
def test_another_process_comes_in_before_every_call(
    place: Path,
    template: Path,
    tally: Tally,
    scene: str,
    other: Callable[..., None],
) -> None:
    """Eviction while loading, loading while evicting, and all other pairs."""
    prepare, act = SCENES[scene]
    prepare(template)
    for at in range(len(calls_of(template, place / "root", act))):
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
        stage.recover(process, is_there=False)
        second.files.close_all()


@pytest.mark.parametrize("seed", range(60))
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
    stage.recover(processes[-1], is_there=False)
