"""Who lives: by the process table on one kernel, by a file that stands still anywhere else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pilotlight.tests.weights_cache.fake_world import Clock
from pilotlight.weights_cache import liveness
from pilotlight.weights_cache.liveness import (
    MAX_GAP_S,
    STALE_S,
    Life,
    Owner,
    Processes,
    Watch,
)

LIMIT_S = 60.0


# ---- names ---------------------------------------------------------------------------------------


@given(st.integers(0, 10**9), st.integers(0, 10**15), st.integers(0, 10**9))
def test_an_owner_is_its_name(pid: int, started: int, serial: int) -> None:
    owner = Owner("0123456789abcdef", pid, started, serial)
    assert Owner.parse(str(owner)) == owner


@pytest.mark.parametrize("name", ["", "x", "0123456789abcdef-1-2", "0123456789abcdef-1-2-3-4", "~"])
def test_other_names_are_nobody(name: str) -> None:
    assert Owner.parse(name) is None


# ---- real processes ------------------------------------------------------------------------------

CHILD = """
import sys
from pilotlight.weights_cache.liveness import THE_WORLD
print(THE_WORLD.processes.new_owner(), flush=True)
sys.stdin.read()
"""


@contextmanager
def child() -> Iterator[tuple[subprocess.Popen[str], Owner]]:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        owner = Owner.parse(process.stdout.readline().strip())
        assert owner is not None
        yield process, owner
        process.kill()


def test_a_killed_process_is_dead_at_once() -> None:
    processes = Processes()
    with child() as (process, owner):
        assert owner.place == processes.place
        assert processes.life(owner) is Life.ALIVE
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert Path(f"/proc/{process.pid}").exists(), "it is to be a zombie"
        assert processes.life(owner) is Life.DEAD
        process.wait(LIMIT_S)
        assert processes.life(owner) is Life.DEAD


def test_a_suspended_process_lives() -> None:
    with child() as (process, owner):
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert Processes().life(owner) is Life.ALIVE


def test_another_process_with_its_pid_is_another() -> None:
    with child() as (_, owner):
        earlier = Owner(owner.place, owner.pid, owner.started - 1, owner.serial)
        assert Processes().life(earlier) is Life.DEAD


def test_a_process_of_another_kernel_cannot_be_seen() -> None:
    with child() as (_, owner):
        elsewhere = Owner("f" * 16, owner.pid, owner.started, owner.serial)
        assert Processes().life(elsewhere) is Life.UNKNOWN


def test_a_process_that_is_hidden_is_not_called_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with hidepid: no entry in /proc, but a signal would find it."""
    monkeypatch.setattr(liveness, "_stat_fields", lambda _pid: None)
    with child() as (process, owner):
        assert Processes().life(owner) is Life.UNKNOWN
        process.kill()
        process.wait(LIMIT_S)
        assert Processes().life(owner) is Life.DEAD


def test_what_has_ended_in_this_process_is_over() -> None:
    processes = Processes()
    owner = processes.new_owner()
    assert processes.life(owner) is Life.ALIVE
    assert processes.is_mine(owner)
    processes.end(owner)
    assert processes.life(owner) is Life.DEAD


def test_a_forked_child_owns_nothing_of_its_parents() -> None:
    code = """
import os
from pilotlight.weights_cache.liveness import THE_WORLD, Life
processes = THE_WORLD.processes
owner = processes.new_owner()
pid = os.fork()
if pid == 0:
    assert not processes.is_mine(owner)
    assert processes.life(owner) is Life.ALIVE
    assert processes.new_owner().pid == os.getpid()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert processes.is_mine(owner)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT_S)


def test_without_proc_nobody_is_called_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_PLACE_FILES", ("/nowhere",))
    first, second = Processes(), Processes()
    assert first.place != second.place
    assert first.life(second.new_owner()) is Life.UNKNOWN


# ---- standing still ------------------------------------------------------------------------------


def test_standing_still_long_enough_is_seen() -> None:
    clock = Clock()
    watch = Watch(clock)
    assert not watch.is_still("a", b"1")
    for _ in range(int(STALE_S / 10) - 1):
        clock.now += 10
        assert not watch.is_still("a", b"1")
    clock.now += 10
    assert watch.is_still("a", b"1")
    assert not watch.is_still("b", b"1"), "that is another file"


def test_any_change_starts_anew() -> None:
    clock = Clock()
    watch = Watch(clock)
    for number in range(100):
        clock.now += 14
        assert not watch.is_still("a", b"%d" % (number // 4))


@pytest.mark.parametrize("jump", [3600.0, 1e9, -3600.0])
def test_a_clock_that_jumps_makes_nobody_stale(jump: float) -> None:
    clock = Clock()
    watch = Watch(clock)
    for _ in range(int(STALE_S / MAX_GAP_S)):
        assert not watch.is_still("a", b"1")
        clock.now += jump


@settings(max_examples=200)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.booleans()), max_size=60))
def test_an_owner_that_renews_is_never_stale(steps: list[tuple[float, bool]]) -> None:
    """However its observer's clock runs: in four looks of one content there is no minute."""
    clock = Clock()
    watch = Watch(clock)
    content, num_same = 0, 0
    for gap, is_renewed in steps:
        clock.now += gap
        if is_renewed or num_same == 4:
            content, num_same = content + 1, 0
        num_same += 1
        assert not watch.is_still("a", content)


def test_no_wall_clock_is_read() -> None:
    folder = Path(liveness.__file__).parent
    pattern = re.compile(r"\btime\.(time|time_ns|gmtime|localtime)\b|\bdatetime\b")
    names = ("liveness", "leases", "single_flight", "trash", "eviction", "store", "artefacts")
    assert [n for n in names if pattern.search((folder / f"{n}.py").read_text())] == []
