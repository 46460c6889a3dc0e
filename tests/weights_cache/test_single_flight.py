"""Of many who want the same work, one does it; and when he dies, the next one does."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from pilotlight.engine.errors import CacheError
from pilotlight.tests.weights_cache.fake_world import (
    ABOUT,
    CHUNK_BYTES,
    SPECS,
    Builder,
    Clock,
    contents,
    key_of,
    machine,
    read_all,
)
from pilotlight.weights_cache.arena_writer import ArenaWriter
from pilotlight.weights_cache.files import FileSystem
from pilotlight.weights_cache.leases import OwnedFiles
from pilotlight.weights_cache.single_flight import Claims
from pilotlight.weights_cache.store import Store
from pilotlight.weights_cache.verify import verify_chunks

KEY = key_of(1)
LIMIT_S = 120.0
NUM_RACING = 64


def check_good(store: Store) -> None:
    leased = store.find_arena(KEY)
    assert leased is not None
    with leased:
        assert verify_chunks(leased.arena)
        assert read_all(leased.arena) == contents(1)


def nothing_is_left(root: Path) -> bool:
    return not any(any((root / name).iterdir()) for name in ("partial", "claims", "trash"))


# ---- races ---------------------------------------------------------------------------------------


def race(stores: list[Store], builder: Builder) -> list[BaseException]:
    errors: list[BaseException] = []
    start = threading.Barrier(len(stores))

    def run(store: Store) -> None:
        start.wait(LIMIT_S)
        try:
            store.publish_arena(KEY, builder, SPECS, ABOUT, chunk_bytes=CHUNK_BYTES)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    return errors


@pytest.mark.parametrize("is_shared", [True, False])
def test_64_threads_build_once(tmp_path: Path, is_shared: bool) -> None:
    shared = Store(tmp_path)
    builder = Builder(1)
    stores = [shared if is_shared else Store(tmp_path) for _ in range(NUM_RACING)]
    assert race(stores, builder) == []
    assert builder.num_builds == 1
    check_good(shared)
    assert nothing_is_left(tmp_path)


RACING = """
import os, sys
from pathlib import Path
from pilotlight.tests.weights_cache.fake_world import *
from pilotlight.weights_cache.store import Store

def build(writer):
    os.write(1, b"built\\n")
    Builder(1)(writer)

read_end, write_end = os.pipe()
for number in range(int(sys.argv[2])):
    if os.fork() == 0:
        os.close(write_end)
        os.read(read_end, 1)  # returns when the parent lets all go at once
        Store(Path(sys.argv[1])).publish_arena(key_of(1), build, SPECS, ABOUT, CHUNK_BYTES)
        os._exit(0)
os.close(write_end)
codes = [os.wait()[1] for _ in range(int(sys.argv[2]))]
print("codes", sorted(set(codes)))
"""


def test_64_processes_build_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACING, str(tmp_path), str(NUM_RACING)]
    done = subprocess.run(command, check=True, timeout=LIMIT_S, capture_output=True, text=True)
    assert Counter(done.stdout.split("\n")) == Counter(["built", "codes [0]", ""])
    check_good(Store(tmp_path))
    assert nothing_is_left(tmp_path)


class Lying(FileSystem):
    """Gives a claim to everybody: a rename onto a full folder succeeds, as if it were empty."""

    def rename(self, source: Path, target: Path) -> None:
        if target.parent.name == "claims":
            shutil.rmtree(target, ignore_errors=True)
        super().rename(source, target)


def test_where_claims_mean_nothing_the_bytes_are_good(tmp_path: Path) -> None:
    """Redundant builds at worst, each in a folder of its own."""
    builder = Builder(1)
    stores = [Store(tmp_path, Lying()) for _ in range(8)]
    assert all(isinstance(error, CacheError) for error in race(stores, builder))
    assert 1 <= builder.num_builds <= 8
    check_good(stores[0])
    Store(tmp_path).collect_garbage(1 << 40, 1 << 40)
    assert not any((tmp_path / "trash").iterdir())


# ---- ends ----------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def die_after(num_tensors: int, builder: Builder) -> Builder:
    class Dying(Builder):
        def __call__(self, writer: ArenaWriter) -> None:
            for name in list(builder.contents)[:num_tensors]:
                writer.write(name, builder.contents[name])
            raise Killed

    return Dying(1)


def build_and_die(store: Store) -> None:
    with pytest.raises(Killed):
        store.publish_arena(KEY, die_after(4, Builder(1)), SPECS, ABOUT, CHUNK_BYTES)


def test_the_next_one_goes_on_where_one_failed(tmp_path: Path) -> None:
    store, builder = Store(tmp_path), Builder(1)
    build_and_die(store)
    assert store.find_arena(KEY) is None
    store.publish_arena(KEY, builder, SPECS, ABOUT, CHUNK_BYTES)
    assert builder.num_kept == 3, "the first chunk was kept"
    check_good(store)
    assert nothing_is_left(tmp_path)


def test_the_next_process_goes_on_where_one_was_killed(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from pilotlight.tests.weights_cache.fake_world import *
from pilotlight.weights_cache.store import Store

def build(writer):
    for name, data in list(contents(1).items())[:4]:
        writer.write(name, data)
    os.kill(os.getpid(), signal.SIGKILL)

Store(Path(sys.argv[1])).publish_arena(key_of(1), build, SPECS, ABOUT, CHUNK_BYTES)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=LIMIT_S)
    assert done.returncode == -9
    store, builder = Store(tmp_path), Builder(1)
    store.publish_arena(KEY, builder, SPECS, ABOUT, CHUNK_BYTES)
    assert builder.num_kept == 3
    check_good(store)
    assert nothing_is_left(tmp_path)


def test_what_one_elsewhere_left_is_thrown_away_not_continued(tmp_path: Path) -> None:
    """He may be only suspended, with the file still open."""
    clock = Clock()
    lost = machine("b", clock).start()

    class Suspended(Builder):
        def __call__(self, writer: ArenaWriter) -> None:
            super().__call__(writer)
            builder = Builder(1)
            here = Store(tmp_path, world=machine("a", clock).start().world)
            here.publish_arena(KEY, builder, SPECS, ABOUT, CHUNK_BYTES)
            assert (builder.num_builds, builder.num_kept) == (1, 0)
            check_good(here)

    before = clock.now
    Store(tmp_path, world=lost.world).publish_arena(KEY, Suspended(1), SPECS, ABOUT, CHUNK_BYTES)
    assert 60 <= clock.now - before < 70, "it took a minute to call him gone"
    check_good(Store(tmp_path))
    Store(tmp_path, world=lost.world).collect_garbage(1 << 40, 1 << 40)
    assert nothing_is_left(tmp_path)


def test_a_living_builder_elsewhere_is_waited_for(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(tmp_path, world=machine("b", clock).start().world)
    other = OwnedFiles(FileSystem(), machine("a", clock).start().world)
    waiting = Claims(other, tmp_path / "claims", clock.pause)
    with store.claim("work"):
        for _ in range(100):
            clock.now += 10
            store._owned.heartbeat.beat()
            assert waiting.try_claim("work") is None
    claim = waiting.try_claim("work")
    assert claim is not None
    claim.close()


# ---- claims --------------------------------------------------------------------------------------


def test_waiting_ends_when_the_work_is_done(tmp_path: Path) -> None:
    clock = Clock()
    here = machine("a", clock)
    store = Store(tmp_path, world=here.start().world)
    waiting = Claims(OwnedFiles(FileSystem(), here.start().world), tmp_path / "claims", clock.pause)
    with store.claim("work"):
        with waiting.claim("work", lambda: clock.num_pauses > 20) as claim:
            assert claim is None
    assert 1000 < clock.now < 1010


def test_a_claim_is_freed_by_any_end(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(Killed), store.claim("work"):
        raise Killed
    with store.claim("work"), store.claim("other work"):
        pass
    assert nothing_is_left(tmp_path)


def test_a_dead_claim_is_taken_by_exactly_one(tmp_path: Path) -> None:
    here = machine()
    dead, *living = (here.start() for _ in range(9))
    claims = [
        Claims(OwnedFiles(FileSystem(), process.world), tmp_path / "claims", lambda _s: None)
        for process in (dead, *living)
    ]
    (tmp_path / "claims").mkdir()
    assert claims[0].try_claim("work") is not None
    dead.kill()
    got = [claim.try_claim("work") for claim in claims[1:]]
    assert [claim is not None for claim in got] == [True] + [False] * 7


def test_taking_a_dead_claim_cannot_hit_the_next_one(tmp_path: Path) -> None:
    """Between seeing that one is dead and removing it, another one took it: he keeps it."""
    here = machine()
    dead, fast, slow = (here.start() for _ in range(3))

    class Raced(FileSystem):
        def unlink(self, path: Path, missing_ok: bool = False) -> None:
            if path.name.startswith(f"{dead.place}-{dead.me()[0]}-"):
                assert winner.try_claim("work") is not None
            super().unlink(path, missing_ok)

    (tmp_path / "claims").mkdir()
    folder = tmp_path / "claims"
    winner = Claims(OwnedFiles(FileSystem(), fast.world), folder, lambda _s: None)
    loser = Claims(OwnedFiles(Raced(), slow.world), folder, lambda _s: None)
    assert Claims(OwnedFiles(FileSystem(), dead.world), folder, lambda _s: None).try_claim("work")
    dead.kill()
    assert loser.try_claim("work") is None
    assert winner.is_claimed("work")
    assert [path.name.split("-")[1] for path in (folder / "work").iterdir()] == [str(fast.me()[0])]
