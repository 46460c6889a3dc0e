"""The chaos suite's stage: processes that do what they do over a file system that fails, and the
judge who looks whether anybody was served bad bytes, or lost what he held."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pilotlight.engine.errors import BadArtefact, PilotlightError
from pilotlight.tests.weights_cache.fake_world import (
    ABOUT,
    CHUNK_BYTES,
    SPECS,
    Builder,
    Clock,
    FakeProcess,
    Machine,
    StillWaiting,
    contents,
    key_of,
    read_all,
)
from pilotlight.tests.weights_cache.faulty_files import (
    Fault,
    FaultyFileSystem,
    Killed,
    QuickFileSystem,
)
from pilotlight.weights_cache.arena import SECTION_BYTES
from pilotlight.weights_cache.artefacts import LeasedArena
from pilotlight.weights_cache.records import RecordedFile, SourceRecord
from pilotlight.weights_cache.store import Store

KEY = key_of(1)
PLAN = b'{"kv_blocks":100}'
BLOB, SHA256, SLUG = b"four", "4" * 64, "model-12345678"
LIMIT_S = 30.0
OBJECTS = ("arenas", "blobs", "models", "sources", "partial", "trash", "leases", "claims")


class Process:
    """One process, its file system and its store."""

    def __init__(self, root: Path, machine: Machine, fault: Fault | None = None) -> None:
        self.root = root
        self.files = FaultyFileSystem(fault) if fault else QuickFileSystem()
        self.process: FakeProcess = machine.start()
        self.clock = machine.clock
        self._store: Store | None = None

    @property
    def store(self) -> Store:
        """Opening it is part of what may fail."""
        if self._store is None:
            self._store = Store(self.root, self.files, self.process.world)
        return self._store

    def run(self, act: Callable[[Process], None]) -> str:
        """The outcome: done, killed, waiting, or a typed error's name. Else it is a failure."""
        self.clock.num_pauses = 0
        try:
            act(self)
        except StillWaiting:
            return "waiting"
        except Killed:
            self.process.kill()
            return "killed"
        except PilotlightError as error:
            return type(error).__name__
        finally:
            self.files.fault = None
        return "done"

    def live_on(self) -> None:
        """What its heartbeat does, once the disk is well again."""
        if self._store is not None and not self.files.is_dead:
            self._store._owned.heartbeat.beat()


# ---- what processes do ---------------------------------------------------------------------------


def check_held(leased: LeasedArena) -> None:
    """What is held under a lease is on the disk, and good."""
    if leased.is_leased:
        assert os.fstat(leased.arena.descriptor).st_nlink == 1, "a leased artefact was deleted"


def serve(process: Process) -> None:
    """A boot: find or build, verify, serve, remember the plan."""
    store = process.store
    leased = store.find_arena(KEY)
    if leased is None:
        store.publish_arena(KEY, Builder(1), SPECS, ABOUT, CHUNK_BYTES)
        leased = store.find_arena(KEY)
    if leased is None:
        return  # evicted meanwhile: this boot serves from the checkpoint
    with leased:
        try:
            assert leased.verification(num_threads=1).start().wait(LIMIT_S)
        finally:
            if not process.files.is_dead:
                check_held(leased)
        assert read_all(leased.arena) == contents(1), "bad bytes were served"
        assert store.read_plan(KEY) in (None, PLAN), "a bad plan was served"
        store.write_plan(KEY, PLAN)
        check_held(leased)


def serve_twice(process: Process) -> None:
    """The second boot builds anew what the first found damaged."""
    try:
        serve(process)
    except BadArtefact:
        serve(process)


def collect(process: Process) -> None:
    process.store.collect_garbage(0, 0)


def remove(process: Process) -> None:
    process.store.remove(KEY)


def fetch(process: Process) -> None:
    """What a fetch does with the store, and a digest that it remembers."""
    store = process.store
    with store.claim(f"source-{SLUG}"):
        if not store.has_blob(SHA256, len(BLOB)):
            aside = store.root / "partial" / f"x{process.process.me()[0]}.part"
            aside.write_bytes(BLOB)
            store.publish_blob(aside, SHA256)
        store.write_record(SLUG, SourceRecord("s", "", (RecordedFile("a", SHA256, len(BLOB)),)))
        store.remember_digest(store.blob_path(SHA256), SHA256)
    assert store.digest_of(store.blob_path(SHA256)) in (None, SHA256)
    with store.lease(f"source-{SLUG}"), suppress(FileNotFoundError):  # evicted before the lease
        assert store.blob_path(SHA256).read_bytes() == BLOB


def forget(process: Process) -> None:
    process.store.remove_source(SLUG)


# ---- what they find ------------------------------------------------------------------------------


def nothing(_root: Path) -> None:
    pass


def published(root: Path) -> None:
    Process(root, Machine("e" * 16, Clock())).run(serve)


def damaged(root: Path) -> None:
    published(root)
    with (root / "arenas" / KEY / "arena.bin").open("r+b") as file:
        file.seek(SECTION_BYTES + 5000)
        file.write(b"damage")


def half_built(root: Path) -> None:
    """By a process of the machine on which all goes on, which was killed."""
    process = Process(root, Machine("a" * 16, Clock()))

    def build(writer: object) -> None:
        Builder(1)(writer)  # type: ignore[arg-type]
        raise Killed

    store = process.store
    try:
        store.publish_arena(KEY, build, SPECS, ABOUT, CHUNK_BYTES)
    except Killed:
        return


def fetched(root: Path) -> None:
    Process(root, Machine("e" * 16, Clock())).run(fetch)


def littered(root: Path) -> None:
    """All that killed processes can leave, of both machines."""
    half_built(root)
    published(root)
    fetched(root)
    for place in ("a" * 16, "b" * 16):
        dead = f"{place}-77-77-1"
        (root / "leases" / f"arena-{KEY}~{dead}").write_bytes(b"%020d" % 7)
        for folder in ("claims/work", f"claims/work~{dead}"):
            (root / folder).mkdir(exist_ok=True)
            (root / folder / dead).write_bytes(b"%020d" % 7)
        shutil.copytree(root / "arenas" / KEY, root / "trash" / f"arenas~{key_of(2)}~{dead}")
        (root / "trash" / f"blobs~{'5' * 64}~{dead}").write_bytes(b"five")
        (root / "trash" / f"partial~x~{dead}~{dead}.condemned").mkdir()
        (root / "partial" / f"{place}.part").write_bytes(b"half")
        (root / "partial" / f"{place}.view-1").mkdir()
        (root / "sources" / f"{place}.json.00.aside").write_bytes(b"{")


# ---- the judge -----------------------------------------------------------------------------------


@dataclass
class Tally:
    """What the suite reports."""

    num_faults: int = 0
    num_interruptions: int = 0
    """How often another process came in between two calls."""
    outcomes: Counter[str] = field(default_factory=Counter)

    def add(self, process: Process, outcome: str) -> None:
        self.num_faults += process.files.num_injected
        self.num_interruptions += process.files.num_run
        self.outcomes[outcome] += 1


def copy_sparse(source: str, target: str) -> str:
    """Holes stay holes: an artefact is mostly that, and thousands are copied."""
    with Path(source).open("rb") as old, Path(target).open("wb") as new:
        num_bytes = os.fstat(old.fileno()).st_size
        new.truncate(num_bytes)
        at = 0
        with suppress(OSError):  # ENXIO: nothing but a hole follows
            while at < num_bytes:
                start = os.lseek(old.fileno(), at, os.SEEK_DATA)
                at = os.lseek(old.fileno(), start, os.SEEK_HOLE)
                os.pwrite(new.fileno(), os.pread(old.fileno(), at - start, start), start)
    shutil.copystat(source, target)
    return target


class Stage:
    """A root as `prepare` left it, and the machines on it."""

    def __init__(self, template: Path, root: Path) -> None:
        self.root = root
        shutil.rmtree(root, ignore_errors=True)
        if template.exists():
            shutil.copytree(template, root, copy_function=copy_sparse)
        self.clock = Clock()
        self.here = Machine("a" * 16, self.clock)
        self.there = Machine("b" * 16, self.clock)

    def start(self, fault: Fault | None = None, *, is_there: bool = False) -> Process:
        return Process(self.root, self.there if is_there else self.here, fault)

    @contextmanager
    def held(self, *, is_held: bool) -> Iterator[None]:
        """Meanwhile another process holds the artefact, if there is one; nobody deletes it."""
        holder = self.start()
        leased = holder.store.find_arena(KEY) if is_held else None
        yield
        if leased is not None:
            check_held(leased)
            leased.close()

    def recover(self, process: Process, *, is_there: bool = False, with_fetch: bool = True) -> None:
        """Without hands: the next boot serves, and garbage collection leaves nothing behind."""
        process.live_on()
        after = self.start(is_there=is_there)
        assert after.run(serve_twice) == "done"
        assert after.store.arenas(), "it was served, and is gone"
        if with_fetch:
            assert after.run(fetch) == "done"
        self._collect_all(after, process)
        after.files.close_all()
        process.files.close_all()

    def _collect_all(self, after: Process, process: Process) -> None:
        """Most things at the first look; what might be somebody's elsewhere, after a minute."""
        left = list(self.root.iterdir())
        for _ in range(8):
            after.store.collect_garbage(-1, -1)  # unfinished work of no bytes, too
            left = [path for name in OBJECTS for path in (self.root / name).iterdir()]
            if not left:
                return
            self.clock.now += 15
            process.live_on()
        assert not left, f"debris is left: {[str(path.relative_to(self.root)) for path in left]}"
