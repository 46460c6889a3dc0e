"""Readers fill a ring with whole chunks, each once; what is not whole is a placed error."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pilotlight.engine.errors import BadArtefact
from pilotlight.tests.weights_cache.fake_world import ABOUT, CHUNK_BYTES, SPECS, Builder, key_of
from pilotlight.weights_cache.arena import Arena, open_arena, read_arena
from pilotlight.weights_cache.arena_writer import ArenaWriter
from pilotlight.weights_cache.files import FileSystem
from pilotlight.weights_cache.reader import native
from pilotlight.weights_cache.reader.direct import reads_direct
from pilotlight.weights_cache.reader.readers import NativeReader, Reader, ThreadReader, open_direct
from pilotlight.weights_cache.reader.ring import MAX_RING_BYTES, Ring, num_slots

LIMIT_S = 30.0
Start = Callable[[Arena, Ring, int], Reader]


def _native(arena: Arena, ring: Ring, num_threads: int) -> Reader:
    library = native.library()
    if library is None:
        pytest.skip("the reader's library was not built")
    return NativeReader(library, arena, ring, False, num_threads)


def _native_direct(arena: Arena, ring: Ring, num_threads: int) -> Reader:
    library = native.library()
    if library is None or open_direct(arena) < 0:
        pytest.skip("no library, or no O_DIRECT on this file system")
    return NativeReader(library, arena, ring, True, num_threads)


STARTS = {"native": _native, "direct": _native_direct, "threads": ThreadReader}


@pytest.fixture(params=STARTS)
def start(request: pytest.FixtureRequest) -> Start:
    return STARTS[request.param]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arena") / "arena.bin"
    with ArenaWriter(path, key_of(1), SPECS, ABOUT, chunk_bytes=CHUNK_BYTES) as writer:
        Builder()(writer)
    return path


def _read_all(reader: Reader) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while (filled := reader.take()) is not None:
        assert filled.index not in found
        found[filled.index] = bytes(reader.ring.view(filled.slot, filled.num_bytes))
        reader.release(filled.slot)
    return found


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(slots=st.integers(2, 9), num_threads=st.integers(1, 6))
def test_every_chunk_comes_once_and_whole(
    start: Start, path: Path, slots: int, num_threads: int
) -> None:
    with read_arena(path) as arena:
        reader = start(arena, Ring(slots, CHUNK_BYTES), num_threads)
        found = _read_all(reader)
        assert reader.take() is None
        reader.close()
        data = path.read_bytes()[arena.header.data_offset :]
        wanted = {i: data[i * CHUNK_BYTES :][:CHUNK_BYTES] for i in range(arena.header.num_chunks)}
    assert found == wanted


def test_nothing_is_read_that_has_no_slot(start: Start, path: Path) -> None:
    with read_arena(path) as arena:
        reader = start(arena, Ring(2, CHUNK_BYTES), 4)
        held = [reader.take(), reader.take()]
        assert len({filled.slot for filled in held if filled}) == 2
        kept = [bytes(reader.ring.view(f.slot, f.num_bytes)) for f in held if f]
        for filled, data in zip(held, kept, strict=True):
            assert filled is not None
            arena.check_chunk(filled.index, data)
            reader.release(filled.slot)
        assert len(_read_all(reader)) == arena.header.num_chunks - 2
        reader.close()


def test_a_file_that_became_shorter_is_an_error(start: Start, path: Path, tmp_path: Path) -> None:
    short = tmp_path / "arena.bin"
    short.write_bytes(path.read_bytes())
    with read_arena(short) as arena:
        os.truncate(short, short.stat().st_size - 100)
        reader = start(arena, Ring(3, CHUNK_BYTES), 2)
        with pytest.raises(BadArtefact, match="the file ends 100 bytes too early"):
            _read_all(reader)
        reader.close()
        reader.close()


def test_a_disk_that_fails_is_an_error_with_its_reason(path: Path) -> None:
    arena = open_arena(FileSystem(), path)
    replaced = os.open(path.parent, os.O_RDONLY)  # a folder in its place: EISDIR
    try:
        os.dup2(replaced, arena.descriptor)
        for start in (_native, ThreadReader):
            reader = start(arena, Ring(2, CHUNK_BYTES), 2)
            with pytest.raises(BadArtefact, match="Is a directory"):
                _read_all(reader)
            reader.close()
    finally:
        os.close(replaced)
        arena.close()


def test_short_reads_are_continued(path: Path) -> None:
    class Stingy(FileSystem):
        def pread_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
            return super().pread_into(descriptor, buffer[:1000], offset)

    with open_arena(Stingy(), path) as arena:
        reader = ThreadReader(arena, Ring(2, CHUNK_BYTES), 2)
        for index, data in _read_all(reader).items():
            arena.check_chunk(index, data)
        reader.close()


def test_who_waits_is_woken_by_the_end(start: Start, path: Path) -> None:
    with read_arena(path) as arena:
        reader = start(arena, Ring(2, CHUNK_BYTES), 2)
        assert reader.take() and reader.take()
        answers: list[object] = []
        waiting = threading.Thread(target=lambda: answers.append(reader.take()))
        waiting.start()
        reader.close()
        waiting.join(LIMIT_S)
        assert answers == [None]
        reader.release(0)


@pytest.mark.parametrize(
    ("num_bytes", "free_bytes", "slots"),
    [
        (100 << 30, 100 << 30, MAX_RING_BYTES >> 23),
        (100 << 30, 1 << 30, 32),
        (100 << 30, 0, 2),
        (20 << 20, 100 << 30, 3),
        (1, 100 << 30, 2),
    ],
)
def test_a_ring_is_as_large_as_the_machine_allows(
    num_bytes: int, free_bytes: int, slots: int
) -> None:
    assert num_slots(num_bytes, 8 << 20, free_bytes) == slots


def test_what_is_in_memory_is_read_from_there(path: Path) -> None:
    path.read_bytes()
    with read_arena(path) as arena:
        assert not reads_direct(arena)


def test_a_probe_ends_by_the_clock_and_tells_the_faster_way(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pilotlight.weights_cache.reader.direct.resident_fraction", lambda _: 0.0)
    now_s = iter(range(1000))
    with read_arena(path) as arena:
        if open_direct(arena) < 0:
            assert not reads_direct(arena)
        else:
            # Both ways take as long by this clock, so neither is better.
            assert not reads_direct(arena, lambda: float(next(now_s)))
