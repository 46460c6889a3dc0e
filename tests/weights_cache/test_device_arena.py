"""An artefact in a device's memory, by a device that does its copies late: never a byte amiss."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pilotlight.engine.errors import BadArtefact
from pilotlight.tests.weights_cache.fake_world import ABOUT, CHUNK_BYTES, SPECS, Builder, key_of
from pilotlight.weights_cache.arena import Arena, read_arena
from pilotlight.weights_cache.arena_writer import ArenaWriter
from pilotlight.weights_cache.reader.readers import Reader, start_reader
from pilotlight.weights_cache.reader.ring import Ring
from pilotlight.weights_cache.stream.copiers import CudaCopier, HostCopier
from pilotlight.weights_cache.stream.device import Copier, DeviceArena, Fence
from pilotlight.weights_cache.stream.mapped import MappedArena


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arena") / "arena.bin"
    with ArenaWriter(path, key_of(1), SPECS, ABOUT, chunk_bytes=CHUNK_BYTES) as writer:
        Builder()(writer)
    return path


class LateCopier:
    """Copies when somebody waits for it, some later than that; `lies`: its fences do not wait."""

    def __init__(self, seed: int = 0, lies: bool = False) -> None:
        self._random = random.Random(seed)
        self._lies = lies
        self._waiting: list[tuple[int, int, int]] = []

    def open(self, ring: Ring, num_bytes: int) -> torch.Tensor:
        self.ring = torch.frombuffer(ring.memory, dtype=torch.uint8)
        self.memory = torch.full((num_bytes,), 0xEE, dtype=torch.uint8)
        return self.memory

    def copy(self, start: int, num_bytes: int, offset: int) -> Fence:
        self._waiting.append((start, num_bytes, offset))
        copier, work = self, self._waiting[-1]

        class Late:
            def wait(self) -> None:
                if not copier._lies:
                    copier.do_until(work)

        return Late()

    def do_until(self, work: tuple[int, int, int]) -> None:
        """Everything up to `work`, in order, as a stream does."""
        while work in self._waiting:
            start, num_bytes, offset = self._waiting.pop(0)
            self.memory[offset : offset + num_bytes] = self.ring[start : start + num_bytes]

    def close(self) -> None:
        if self._waiting:
            self.do_until(self._waiting[-1])


def _filled(arena: Arena, copier: Copier, slots: int = 2, **more: object) -> DeviceArena:
    reader = start_reader(arena, Ring(slots, arena.header.chunk_bytes), num_threads=3)
    on_bytes = more.pop("on_bytes", lambda _num_done: None)
    found = DeviceArena(arena, reader, copier, **more)  # type: ignore[arg-type]
    found.finish(on_bytes)  # type: ignore[arg-type]
    return found


def _assert_equal(arena: Arena, found: DeviceArena) -> None:
    mapped = MappedArena(arena)
    for name in arena.tensors:
        a, b = mapped.tensor(name), found.tensor(name).cpu()
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def test_the_processor_as_a_device(path: Path) -> None:
    seen: list[int] = []
    with read_arena(path) as arena:
        _assert_equal(arena, _filled(arena, HostCopier(), 3, on_bytes=seen.append))
        assert seen == sorted(seen)
        assert seen[-1] == arena.num_bytes


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(slots=st.integers(2, 6), seed=st.integers(0, 1000))
def test_no_slot_is_written_before_the_device_has_read_it(
    path: Path, slots: int, seed: int
) -> None:
    with read_arena(path) as arena:
        _assert_equal(arena, _filled(arena, LateCopier(seed), slots))


def test_a_device_that_lies_about_its_copies_is_seen_in_the_bytes(path: Path) -> None:
    """The test above could fail: this is what a slot that is freed too early does."""
    with read_arena(path) as arena:
        found = _filled(arena, LateCopier(lies=True), 2)
        with pytest.raises(AssertionError):
            _assert_equal(arena, found)


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("make", [HostCopier, LateCopier])
def test_a_bad_chunk_never_becomes_a_tensor(
    make: Callable[[], Copier], path: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "arena.bin"
    bad.write_bytes(path.read_bytes())
    with read_arena(bad) as arena:
        _flip(bad, arena.header.data_offset + arena.header.data_bytes // 2)
        with pytest.raises(BadArtefact, match="chunk"):
            _filled(arena, make())
        assert _filled(arena, make(), verifies=False) is not None


def test_a_device_that_fails_ends_the_reading(path: Path) -> None:
    class Broken(HostCopier):
        def copy(self, start: int, num_bytes: int, offset: int) -> Fence:
            raise RuntimeError("an illegal memory access")

    readers: list[Reader] = []
    with read_arena(path) as arena:
        readers.append(start_reader(arena, Ring(2, CHUNK_BYTES)))
        with pytest.raises(RuntimeError, match="illegal"):
            DeviceArena(arena, readers[0], Broken()).finish()
        assert readers[0].take() is None


def test_addresses_are_there_before_the_bytes(path: Path) -> None:
    """What is captured over them meanwhile sees the weights when they have come."""

    class Held(HostCopier):
        may_go = threading.Event()

        def copy(self, start: int, num_bytes: int, offset: int) -> Fence:
            assert self.may_go.wait(60)
            return super().copy(start, num_bytes, offset)

    with read_arena(path) as arena:
        reader = start_reader(arena, Ring(2, CHUNK_BYTES))
        found = DeviceArena(arena, reader, Held())
        views = {name: found.tensor(name) for name in arena.tensors}
        addresses = {name: view.data_ptr() for name, view in views.items()}
        Held.may_go.set()
        found.finish()
        _assert_equal(arena, found)
        assert addresses == {name: found.tensor(name).data_ptr() for name in arena.tensors}
        mapped = MappedArena(arena)
        assert all(torch.equal(views[name], mapped.tensor(name)) for name in views)


def test_what_is_abandoned_is_not_written_any_more(path: Path) -> None:
    with read_arena(path) as arena:
        reader = start_reader(arena, Ring(2, CHUNK_BYTES))
        found = DeviceArena(arena, reader, HostCopier())
        found.abandon()
        assert reader.take() is None
        assert not any(thread.name.startswith("copy-") for thread in threading.enumerate())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_cuda_device(path: Path) -> None:
    with read_arena(path) as arena:
        for slots in (2, 5):
            _assert_equal(arena, _filled(arena, CudaCopier(torch.device("cuda")), slots))
