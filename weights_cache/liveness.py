"""Who owns a file, and whether that owner still lives: without locks and without a wall clock.

An owner writes itself into the *name* of its file, so no reader ever sees half of it. On the same
kernel and in the same namespaces the process table decides, at once. Anywhere else only the file's
content can: its owner counts it up, and an observer that watched it stand still long enough, by
its own clock, calls the owner gone. Knows nothing of what is owned.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .files import FileSystem

logger = logging.getLogger(__name__)

BEAT_S = 10.0
STALE_S = 60.0
MAX_GAP_S = 15.0
"""Between two looks at most this much counts as watched: the observer may have been suspended."""

_OWNER = re.compile(r"([0-9a-f]{16})-(\d{1,10})-(\d{1,20})-(\d{1,10})")
_PLACE_FILES = ("/proc/self/ns/pid", "/proc/self/ns/time")


class Life(enum.Enum):
    ALIVE = enum.auto()
    DEAD = enum.auto()
    UNKNOWN = enum.auto()
    """It lives, or lived, where this process cannot see."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A process (`started` tells it from a later one with its pid), and what it owns it for."""

    place: str
    pid: int
    started: int
    serial: int

    def __str__(self) -> str:
        return f"{self.place}-{self.pid}-{self.started}-{self.serial}"

    @classmethod
    def parse(cls, name: str) -> Owner | None:
        match = _OWNER.fullmatch(name)
        return cls(match[1], int(match[2]), int(match[3]), int(match[4])) if match else None


class Processes:
    """The process table, as far as this process sees it, and the owners that it is itself."""

    def __init__(self) -> None:
        self.place = _place()
        self._serials = itertools.count(1)
        self._live: set[Owner] = set()

    def new_owner(self) -> Owner:
        owner = Owner(self.place, *self.me(), next(self._serials))
        self._live.add(owner)
        return owner

    def end(self, owner: Owner) -> None:
        """The owner is over, even if its file could not be removed."""
        self._live.discard(owner)

    def is_mine(self, owner: Owner) -> bool:
        """False in a forked child for what its parent owns."""
        return (owner.place, owner.pid, owner.started) == (self.place, *self.me())

    def life(self, owner: Owner) -> Life:
        if self.is_mine(owner):
            return Life.ALIVE if owner in self._live else Life.DEAD
        if owner.place != self.place:
            return Life.UNKNOWN
        return self.seen(owner.pid, owner.started)

    def me(self) -> tuple[int, int]:
        """This process: its pid, and when it started."""
        pid = os.getpid()
        return pid, _start_ticks(pid)

    def seen(self, pid: int, started: int) -> Life:
        """Of a process that sees the same table."""
        return _life_of(pid, started)


class Watch:
    """How long this observer has seen files stand still."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[object, float, float]] = {}
        self._lock = threading.Lock()

    def is_still(self, name: str, content: object) -> bool:
        """Whether `content` was the same at every look for STALE_S."""
        with self._lock:
            now = self._clock()
            before, at, watched_s = self._seen.get(name, (content, now, 0.0))
            watched_s += min(max(now - at, 0.0), MAX_GAP_S)
            if before != content:
                watched_s = 0.0
            self._seen[name] = (content, now, watched_s)
            return watched_s >= STALE_S

    def forget(self, name: str) -> None:
        with self._lock:
            self._seen.pop(name, None)


class Heartbeat:
    """Counts this process's files up, so that observers elsewhere see that it lives; and removes
    those that could not be removed when they should have been."""

    def __init__(self, files: FileSystem, period_s: float | None) -> None:
        self._files = files
        self._period_s = period_s
        self._held: dict[Path, Callable[[], None]] = {}
        self._unwanted: set[Path] = set()
        self._beats = itertools.count(1)
        self._lock = threading.Lock()
        self._thread_pid = 0

    def add(self, path: Path, when_missing: Callable[[], None] = lambda: None) -> None:
        with self._lock:
            self._held[path] = when_missing
            self._ensure_thread()

    def remove(self, path: Path) -> None:
        with self._lock:
            self._held.pop(path, None)

    def unlink_soon(self, path: Path) -> None:
        with self._lock:
            self._unwanted.add(path)
            self._ensure_thread()

    def beat(self) -> None:
        count = b"%020d" % next(self._beats)
        with self._lock:
            held, unwanted = list(self._held.items()), list(self._unwanted)
        for path, when_missing in held:
            self._write(path, count, when_missing)
        for path in unwanted:
            self._unlink(path)

    def _write(self, path: Path, count: bytes, when_missing: Callable[[], None]) -> None:
        try:
            with self._files.opened(path, os.O_WRONLY) as descriptor:
                self._files.write_all(descriptor, count, 0)
        except FileNotFoundError:
            with self._lock:
                is_held = path in self._held
            if is_held:
                when_missing()
        except OSError as error:
            logger.warning("%s cannot be renewed (%s); the next try is soon", path, error)

    def _unlink(self, path: Path) -> None:
        with suppress(OSError):
            self._files.unlink(path, missing_ok=True)
            with self._lock:
                self._unwanted.discard(path)

    def _ensure_thread(self) -> None:
        """Threads do not live on in a forked child: it starts its own."""
        if self._period_s is not None and self._thread_pid != os.getpid():
            self._thread_pid = os.getpid()
            threading.Thread(target=self._run, name="lease-heartbeat", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(self._period_s or BEAT_S)
            self.beat()


@dataclass(frozen=True)
class Surroundings:
    """What a store needs of the world beside files; a test gives it another world."""

    processes: Processes
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep
    beat_s: float | None = BEAT_S
    """None: no thread; whoever tests beats by hand."""


def _place() -> str:
    """The same for all who see one process table, start times included; different for others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        parts = [boot, *(str(Path(path).readlink()) for path in _PLACE_FILES)]
    except (OSError, ValueError):
        parts = [os.urandom(16).hex()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _start_ticks(pid: int) -> int:
    """Of this process; a forked child asks with another pid."""
    fields = _stat_fields(pid)
    return int(fields[19]) if fields else 0


def _stat_fields(pid: int) -> list[str] | None:
    """/proc/<pid>/stat behind the command's name, which may hold anything."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _life_of(pid: int, started: int) -> Life:
    fields = _stat_fields(pid)
    if fields is None:
        # Not there, or hidden from us (hidepid): only the first is death.
        return Life.DEAD if _is_no_process(pid) else Life.UNKNOWN
    is_ended = fields[0] in "ZX" and int(fields[17]) <= 1
    return Life.DEAD if is_ended or int(fields[19]) != started else Life.ALIVE


def _is_no_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


THE_WORLD = Surroundings(Processes())
