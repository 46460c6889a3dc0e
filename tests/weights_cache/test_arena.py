"""The arena's contract: what is written is read back, and every lie in a file is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pilotlight.engine.errors import BadArtefact, CacheError, NotEnoughDisk
from pilotlight.tests.weights_cache.fake_world import (
    ABOUT,
    CHUNK_BYTES,
    SPECS,
    Builder,
    contents,
    key_of,
    read_all,
)
from pilotlight.weights_cache.arena import (
    BLOCK_BYTES,
    SECTION_BYTES,
    TENSOR_BYTES,
    TensorSpec,
    read_arena,
)
from pilotlight.weights_cache.arena_writer import JOURNAL_SUFFIX, ArenaWriter
from pilotlight.weights_cache.files import FileSystem
from pilotlight.weights_cache.manifest import ITEM_BYTES
from pilotlight.weights_cache.verify import verify_chunks

KEY = key_of(1)


def write(path: Path, specs: tuple[TensorSpec, ...] = SPECS, seed: int = 0) -> Path:
    with ArenaWriter(path, KEY, specs, ABOUT, chunk_bytes=CHUNK_BYTES) as writer:
        Builder(seed, specs)(writer)
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("good") / "arena").read_bytes()


def check_good(path: Path, specs: tuple[TensorSpec, ...] = SPECS, seed: int = 0) -> None:
    with read_arena(path) as arena:
        assert verify_chunks(arena)
        assert read_all(arena) == contents(seed, specs)
    assert not path.with_name(path.name + JOURNAL_SUFFIX).exists()


# ---- writing -----------------------------------------------------------------------------------


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "arena")
    check_good(path)
    with read_arena(path) as arena:
        assert arena.header.about == ABOUT
        assert arena.header.key == KEY
        assert [t.shape for t in arena.header.tensors] == [s.shape for s in SPECS]
        assert path.stat().st_size == arena.header.file_bytes


@st.composite
def specs_and_chunk(draw: st.DrawFn) -> tuple[tuple[TensorSpec, ...], int]:
    specs = []
    for index in range(draw(st.integers(1, 6))):
        dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
        shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
        num_bytes = ITEM_BYTES[dtype]
        for size in shape:
            num_bytes *= size
        section = draw(st.sampled_from("ab"))
        specs.append(TensorSpec(f"t{index}", dtype, shape, "plain", section, num_bytes))
    specs.append(TensorSpec("last", "U8", (3,), "plain", "a", 3))
    return tuple(specs), BLOCK_BYTES * draw(st.sampled_from([1, 2, 512]))


@settings(max_examples=40, deadline=None)
@given(specs_and_chunk())
def test_any_tensors_lie_where_they_should(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[tuple[TensorSpec, ...], int]
) -> None:
    specs, chunk_bytes = case
    path = tmp_path_factory.mktemp("any") / "arena"
    with ArenaWriter(path, KEY, specs, {}, chunk_bytes=chunk_bytes) as writer:
        for name, data in contents(3, specs).items():
            for at in range(0, len(data), 1000):  # piece after piece
                writer.write(name, data[at : at + 1000])
    check_good(path, specs, 3)
    with read_arena(path) as arena:
        assert arena.header.data_offset % SECTION_BYTES == 0
        before = None
        for tensor, spec in zip(arena.header.tensors, specs, strict=True):
            unit = TENSOR_BYTES if spec.section == before else SECTION_BYTES
            assert tensor.offset % unit == 0
            before = spec.section


@pytest.mark.parametrize(
    ("write_wrong", "message"),
    [
        (lambda w: w.write("tensor.1", b"x"), "tensor.0 is not whole yet"),
        (lambda w: w.write("tensor.0", b"x" * 2101), "has 2100 bytes; more were written"),
        (lambda w: w.write("tensor.9", b"x"), "tensor.0 is not whole yet"),
        (lambda w: w.write("tensor.0", b"x"), "tensor.0 is not whole yet, the end comes later"),
    ],
)
def test_a_wrong_caller_is_told(
    tmp_path: Path, write_wrong: Callable[[ArenaWriter], None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        with ArenaWriter(tmp_path / "arena", KEY, SPECS, ABOUT) as writer:
            write_wrong(writer)
    with pytest.raises(BadArtefact):
        read_arena(tmp_path / "arena")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorSpec("a", "U8", (3,), "plain", "s", 4), "does not have 4 bytes"),
        (TensorSpec("a", "U7", (3,), "plain", "s", 3), "unknown dtype"),
        (TensorSpec("a", "U8", (0,), "plain", "s", 0), "no tensor has a byte"),
    ],
)
def test_tensors_that_make_no_arena_are_refused(
    tmp_path: Path, spec: TensorSpec, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ArenaWriter(tmp_path / "arena", KEY, [spec], ABOUT)


def test_a_name_that_appears_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tensor\.0 appears twice"):
        ArenaWriter(tmp_path / "arena", KEY, [SPECS[0], SPECS[0]], ABOUT)


# ---- writing that was interrupted --------------------------------------------------------------


class Interrupt(Exception):
    pass


def write_first(path: Path, num_bytes: int, seed: int = 0) -> None:
    """As far as a writer comes that is interrupted after `num_bytes` of the caller's."""
    with pytest.raises(Interrupt):
        with ArenaWriter(path, KEY, SPECS, ABOUT, chunk_bytes=CHUNK_BYTES) as writer:
            for name, data in contents(seed).items():
                writer.write(name, data[:num_bytes])
                num_bytes -= len(data)
                if num_bytes <= 0:
                    raise Interrupt


@pytest.mark.parametrize(
    ("num_bytes", "num_chunks", "num_tensors"),
    [(1, 0, 0), (4020, 0, 0), (4021, 1, 3), (8060, 1, 3), (8061, 2, 4), (9213, 2, 4)],
)
def test_writing_goes_on_behind_the_last_whole_chunk(
    tmp_path: Path, num_bytes: int, num_chunks: int, num_tensors: int
) -> None:
    path = tmp_path / "arena"
    write_first(path, num_bytes)
    with pytest.raises(BadArtefact):
        read_arena(path)
    builder = Builder()
    with ArenaWriter(path, KEY, SPECS, ABOUT, chunk_bytes=CHUNK_BYTES) as writer:
        assert writer.num_bytes_done == num_chunks * CHUNK_BYTES
        builder(writer)
    assert builder.num_kept == num_tensors
    check_good(path)


@pytest.mark.parametrize("num_bytes", [4021, 9213])
def test_what_is_written_again_is_only_passed_over(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "arena"
    write_first(path, num_bytes)
    with ArenaWriter(path, KEY, SPECS, ABOUT, chunk_bytes=CHUNK_BYTES) as writer:
        for name, data in contents().items():
            writer.write(name, data)
    check_good(path)


def test_a_chunk_that_changed_meanwhile_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    write_first(path, 9000)
    with path.open("r+b") as file:
        file.seek(SECTION_BYTES + 5000)
        file.write(b"damage")
    with ArenaWriter(path, KEY, SPECS, ABOUT, chunk_bytes=CHUNK_BYTES) as writer:
        assert writer.num_bytes_done == CHUNK_BYTES
        Builder()(writer)
    check_good(path)


@pytest.mark.parametrize("damage", [b"", b"x", b"0" * 33, b"\xff" * 100, None])
def test_a_journal_that_is_damaged_costs_only_time(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "arena"
    write_first(path, 9000)
    journal = path.with_name(path.name + JOURNAL_SUFFIX)
    journal.unlink() if damage is None else journal.write_bytes(damage)
    check_good(write(path))


def test_what_was_begun_for_another_layout_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    write_first(path, 9000)
    check_good(write(path, SPECS[::-1], seed=5), SPECS[::-1], seed=5)


# ---- the disk ----------------------------------------------------------------------------------


class SmallDisk(FileSystem):
    def __init__(self, num_free: int = 1 << 40, num_writable: int = 1 << 40) -> None:
        self.num_free = num_free
        self.num_writable = num_writable
        self.num_written = 0

    def free_bytes(self, path: Path) -> int:
        return self.num_free

    def pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        self.num_written += len(data)
        if self.num_written > self.num_writable:
            raise OSError(28, "No space left on device")
        return super().pwrite(descriptor, data, offset)

    def fallocate(self, descriptor: int, num_bytes: int) -> None:
        raise OSError(95, "Operation not supported")


def test_a_full_disk_is_found_before_the_first_byte(tmp_path: Path) -> None:
    disk = SmallDisk(num_free=2_000_000)
    with pytest.raises(NotEnoughDisk, match=r"2000000 bytes free.*`pilotlight cache gc`"):
        with ArenaWriter(tmp_path / "arena", KEY, SPECS, ABOUT, disk):
            pytest.fail("it was opened")
    assert disk.num_written < 100


def test_a_disk_that_fills_up_meanwhile_is_that_error_too(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with pytest.raises(NotEnoughDisk, match="is full; make room"):
        with ArenaWriter(path, KEY, SPECS, ABOUT, SmallDisk(num_writable=6000)) as writer:
            Builder()(writer)
    check_good(write(path))


def test_room_that_cannot_be_reserved_is_reserved_by_writing(tmp_path: Path) -> None:
    with ArenaWriter(tmp_path / "arena", KEY, SPECS, ABOUT, SmallDisk()) as writer:
        Builder()(writer)
    check_good(tmp_path / "arena")


def test_a_failed_write_is_not_papered_over(tmp_path: Path) -> None:
    class FailsOnce(FileSystem):
        num_calls = 0

        def pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
            self.num_calls += 1
            if self.num_calls == 2:
                raise OSError(5, "Input/output error")
            return super().pwrite(descriptor, data, offset)

    with pytest.raises(ValueError, match=r"an earlier write to .* failed"):
        with ArenaWriter(tmp_path / "arena", KEY, SPECS, ABOUT, FailsOnce()) as writer:
            with pytest.raises(CacheError):
                writer.write("tensor.0", b"1" * 1000)
            writer.write("tensor.0", b"1" * 1100)
