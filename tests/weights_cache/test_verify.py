"""Verification beside other work: verdicts, stops, threads, disks that fail under a mapping."""

from __future__ import annotations

import errno
import mmap
import threading
from pathlib import Path

import pytest
from pilotlight.engine.errors import BadArtefact
from pilotlight.tests.weights_cache.fake_world import (
    ABOUT,
    CHUNK_BYTES,
    SPECS,
    Builder,
    contents,
    key_of,
    read_all,
)
from pilotlight.weights_cache.arena import SECTION_BYTES, Arena, read_arena
from pilotlight.weights_cache.arena_writer import ArenaWriter
from pilotlight.weights_cache.files import FileSystem
from pilotlight.weights_cache.verify import Verification, verify_chunks

LIMIT_S = 30.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "arena"
    with ArenaWriter(path, key_of(1), SPECS, ABOUT, chunk_bytes=CHUNK_BYTES) as writer:
        Builder()(writer)
    return path


def damage(path: Path, chunk: int) -> None:
    with path.open("r+b") as file:
        file.seek(SECTION_BYTES + chunk * CHUNK_BYTES + 10)
        file.write(b"?!")


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_every_byte_is_counted_once(path: Path, num_threads: int) -> None:
    seen: list[int] = []
    with read_arena(path) as arena:
        assert Verification(arena, seen.append, num_threads=num_threads).start().wait(LIMIT_S)
        assert seen == sorted(seen)
        assert len(seen) == arena.header.num_chunks
        assert seen[-1] == arena.num_bytes


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_bad_chunk_is_named_to_whoever_waits_and_whoever_listens(
    path: Path, num_threads: int
) -> None:
    damage(path, 1)
    heard: list[BadArtefact] = []
    with read_arena(path) as arena:
        verification = Verification(arena, on_failure=heard.append, num_threads=num_threads)
        with pytest.raises(BadArtefact, match=r"chunk 1 .* is not what was written"):
            verification.start().wait(LIMIT_S)
        assert verification.is_done
        assert [str(error) for error in heard] == [str(verification._error)]


def test_a_stop_is_no_verdict(path: Path) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def hold(_num_done: int) -> None:
        reached.set()
        assert go_on.wait(LIMIT_S)

    with read_arena(path) as arena:
        verification = Verification(arena, hold, num_threads=1).start()
        assert reached.wait(LIMIT_S)
        assert not verification.wait(0)
        assert not verification.is_done
        verification._stop.set()
        go_on.set()
        verification.stop()
        assert verification.is_done
        assert not verification.wait()


def test_one_that_never_started_can_be_stopped(path: Path) -> None:
    with read_arena(path) as arena:
        verification = Verification(arena)
        verification.stop()
        assert not verification.is_done


def test_a_listener_that_fails_is_no_good_verdict(path: Path) -> None:
    def fail(_num_done: int) -> None:
        raise RuntimeError("the listener")

    with read_arena(path) as arena, pytest.raises(RuntimeError, match="the listener"):
        Verification(arena, fail).start().wait(LIMIT_S)


def test_the_mapping_outlives_the_arena(path: Path) -> None:
    with read_arena(path) as arena:
        view = memoryview(arena.map())
        assert arena.map() is arena.map()
    tensor = arena.tensors["tensor.3"]
    assert view[tensor.offset : tensor.end] == contents()["tensor.3"]


# ---- disks that fail -----------------------------------------------------------------------------


def test_a_file_cut_under_its_mapping_is_an_error_and_no_crash(path: Path) -> None:
    with read_arena(path) as arena:
        arena.map()
        with path.open("r+b") as file:
            file.truncate(SECTION_BYTES + CHUNK_BYTES)
        with pytest.raises(BadArtefact, match="cannot be read at chunk 1"):
            verify_chunks(arena)


class OldKernel(FileSystem):
    """Cannot bring pages in; reads, and how."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.num_reads = 0

    def populate(self, mapping: mmap.mmap, offset: int, num_bytes: int) -> bool:
        return False

    def pread_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        if offset >= SECTION_BYTES and self.error:
            raise OSError(self.error, "Input/output error")
        self.num_reads += 1
        return super().pread_into(descriptor, buffer[:1000], offset)


def test_without_the_call_for_pages_the_file_is_read(path: Path) -> None:
    files = OldKernel()
    with read_arena(path, files) as arena:
        assert verify_chunks(arena)
        assert read_all(arena) == contents()
    damage(path, 2)
    with read_arena(path, files) as arena, pytest.raises(BadArtefact, match="chunk 2"):
        verify_chunks(arena)


def test_a_disk_that_cannot_be_read_is_a_bad_artefact(path: Path) -> None:
    with read_arena(path, OldKernel(errno.EIO)) as arena:
        with pytest.raises(BadArtefact, match="cannot be read at chunk 0: Input/output error"):
            verify_chunks(arena)


def test_two_readers_share_the_pages(path: Path) -> None:
    """Nothing is copied: what a tensor is made of are the file's own pages."""
    with read_arena(path) as first, read_arena(path) as second:
        assert isinstance(first, Arena)
        for arena in (first, second):
            view = memoryview(arena.map())
            assert view.readonly
            assert view.nbytes == arena.num_bytes
