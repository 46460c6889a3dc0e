"""Leases: what is leased stays, whoever was killed, and whatever else fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pilotlight.tests.weights_cache.fake_world import (
    ABOUT,
    CHUNK_BYTES,
    SPECS,
    Builder,
    Clock,
    FakeProcess,
    contents,
    key_of,
    machine,
    read_all,
)
from pilotlight.weights_cache.artefacts import LeasedArena
from pilotlight.weights_cache.files import FileSystem
from pilotlight.weights_cache.liveness import BEAT_S
from pilotlight.weights_cache.store import Store

KEY = key_of(1)
LIMIT_S = 60.0


def publish(store: Store, seed: int = 1) -> Path:
    return store.publish_arena(key_of(seed), Builder(seed), SPECS, ABOUT, chunk_bytes=CHUNK_BYTES)


def found(store: Store, key: str = KEY) -> LeasedArena:
    leased = store.find_arena(key)
    assert leased is not None
    assert leased.is_leased
    return leased


def num_leases(store: Store) -> int:
    return store.arenas()[0].num_leases


def evict(store: Store) -> list[str]:
    """What is left when all that may go has gone."""
    store.collect_garbage(0, 0)
    return [arena.key for arena in store.arenas()]


# ---- real processes ------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
from pilotlight.weights_cache.store import Store
leased = Store(Path(sys.argv[1])).find_arena(sys.argv[2])
print("found" if leased else "missed", flush=True)
sys.stdin.read()
"""


@contextmanager
def loader(store: Store) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the artefact."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(store.root), KEY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "found\n"
        yield process
        process.kill()


def test_what_another_process_holds_stays_until_it_is_killed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)
    with loader(store) as process:
        assert num_leases(store) == 1
        assert not store.remove(KEY)
        assert evict(store) == [KEY]
        process.send_signal(signal.SIGKILL)
        process.wait(LIMIT_S)
        assert num_leases(store) == 0
        assert evict(store) == []
    assert not list((tmp_path / "leases").iterdir())


def test_what_a_suspended_process_holds_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)
    with loader(store) as process:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert evict(store) == [KEY]


def test_a_zombie_holds_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)
    with loader(store) as process:
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert evict(store) == []


def test_a_forked_child_does_not_give_back_what_its_parent_holds(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from pilotlight.weights_cache.store import Store
leased = Store(Path(sys.argv[1])).find_arena(sys.argv[2])
pid = os.fork()
if pid == 0:
    leased.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert Store(Path(sys.argv[1])).arenas()[0].num_leases == 1
"""
    store = Store(tmp_path)
    publish(store)
    command = [sys.executable, "-c", code, str(tmp_path), KEY]
    subprocess.run(command, check=True, timeout=LIMIT_S)
    assert evict(store) == []


# ---- processes that the test makes ---------------------------------------------------------------


class Two:
    """A loader that holds the artefact, and an evictor."""

    def __init__(self, root: Path, is_elsewhere: bool) -> None:
        self.clock = Clock()
        here = machine("a", self.clock)
        there = machine("b", self.clock) if is_elsewhere else here
        self.loading = here.start()
        self.loader = Store(root, world=self.loading.world)
        self.evictor = Store(root, world=there.start().world)
        self.here = here
        publish(self.loader)
        self.leased = found(self.loader)

    def pass_time(self, seconds: float, *, is_beating: bool) -> list[str]:
        """What is left, after the evictor has looked again and again."""
        left = evict(self.evictor)
        for _ in range(int(seconds / BEAT_S)):
            self.clock.now += BEAT_S
            if is_beating:
                self.loader._owned.heartbeat.beat()
            left = evict(self.evictor)
        return left


@pytest.fixture
def near(tmp_path: Path) -> Two:
    return Two(tmp_path, is_elsewhere=False)


@pytest.fixture
def far(tmp_path: Path) -> Two:
    return Two(tmp_path, is_elsewhere=True)


def test_on_one_kernel_no_time_makes_a_living_lease_stale(near: Two) -> None:
    assert near.pass_time(3600, is_beating=False) == [KEY]
    near.loading.kill()
    assert evict(near.evictor) == []


def test_a_process_with_the_pid_of_a_dead_one_holds_nothing(near: Two) -> None:
    near.loading.kill()
    again = near.here.start(pid=near.loading.me()[0])
    assert again.me()[0] == near.loading.me()[0]
    assert evict(near.evictor) == []


def test_elsewhere_a_lease_that_is_renewed_stays(far: Two) -> None:
    assert far.pass_time(3600, is_beating=True) == [KEY]
    assert read_all(far.leased.arena) == contents(1)
    far.leased.close()
    assert evict(far.evictor) == []


def test_elsewhere_a_lease_that_stands_still_for_a_minute_is_over(far: Two) -> None:
    far.loading.kill()
    assert far.pass_time(50, is_beating=False) == [KEY]
    assert far.pass_time(10, is_beating=False) == []


@pytest.mark.parametrize("jump", [1e9, -1e9])
def test_a_clock_that_jumps_evicts_nothing(far: Two, jump: float) -> None:
    for _ in range(100):
        far.clock.now += jump
        far.loader._owned.heartbeat.beat()
        assert evict(far.evictor) == [KEY]
        far.clock.now += jump
        assert evict(far.evictor) == [KEY]


def test_one_taken_for_gone_comes_back(far: Two) -> None:
    """Its machine was suspended: the artefact is lost for others, not for whoever mapped it."""
    assert far.pass_time(70, is_beating=False) == []
    assert read_all(far.leased.arena) == contents(1)
    publish(far.evictor)
    far.loader._owned.heartbeat.beat()
    assert evict(far.evictor) == [KEY], "it is leased again"
    far.leased.close()
    assert evict(far.evictor) == []


# ---- file systems that fail ----------------------------------------------------------------------


class Stubborn(FileSystem):
    """Refuses calls by name."""

    def __init__(self) -> None:
        self.refused: set[str] = set()

    def unlink(self, path: Path, missing_ok: bool = False) -> None:
        self._check("unlink")
        super().unlink(path, missing_ok)

    def open(self, path: Path, flags: int) -> int:
        if flags & os.O_CREAT:
            self._check("create")
        return super().open(path, flags)

    def _check(self, name: str) -> None:
        if name in self.refused:
            raise OSError(28, "No space left on device")


def stubborn(root: Path) -> tuple[Stubborn, Store, FakeProcess]:
    files, process = Stubborn(), machine().start()
    store = Store(root, files, process.world)
    publish(store)
    return files, store, process


def test_a_lease_that_cannot_be_removed_counts_no_longer(tmp_path: Path) -> None:
    files, store, process = stubborn(tmp_path)
    leased = found(store)
    files.refused.add("unlink")
    leased.close()
    assert num_leases(store) == 0, "its own process knows"
    files.refused.clear()
    other = Store(tmp_path, world=process._machine.start().world)
    assert num_leases(other) == 1, "others only see a living process's lease"
    store._owned.heartbeat.beat()
    assert num_leases(other) == 0


def test_a_disk_that_takes_no_lease_still_serves(tmp_path: Path) -> None:
    files, store, _ = stubborn(tmp_path)
    files.refused.add("create")
    leased = store.find_arena(KEY)
    assert leased is not None
    assert not leased.is_leased
    assert read_all(leased.arena) == contents(1)


def test_a_folder_of_leases_that_is_not_to_be_seen_is_not_empty(tmp_path: Path) -> None:
    """As where a network file system remembers that something was not there."""

    class Forgetful(FileSystem):
        def list(self, folder: Path) -> list[str]:
            if folder.name == "leases":
                raise FileNotFoundError(2, "No such file or directory")
            return super().list(folder)

    store = Store(tmp_path)
    publish(store)
    with found(store):
        assert evict(Store(tmp_path, Forgetful())) == [KEY]


def test_a_lease_from_elsewhere_that_cannot_be_read_is_one(tmp_path: Path) -> None:
    class Unreadable(FileSystem):
        def pread(self, descriptor: int, num_bytes: int, offset: int) -> bytes:
            raise OSError(5, "Input/output error")

    clock = Clock()
    store = Store(tmp_path, world=machine("a", clock).start().world)
    evictor = Store(tmp_path, world=machine("b", clock).start().world)
    publish(store)
    evictor._owned.files = Unreadable()
    with found(store):
        for _ in range(20):
            clock.now += BEAT_S
            assert evict(evictor) == [KEY]
