"""Sources brought into a store, from a real nginx, S3 and folder; ended in every way, resumed."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from pilotlight.engine.errors import CacheError, NotEnoughDisk, SourceError
from pilotlight.tests.weights_cache.checkpoints import (
    SHARD_BYTES,
    SHARDS,
    replace_shard,
    write_checkpoint,
)
from pilotlight.tests.weights_cache.servers import (
    LIMIT_S,
    CuttingProxy,
    Nginx,
    Waits,
    cutting,
    nginx,
    patient,
    s3_server,
)
from pilotlight.weights_cache import partial as partial_module
from pilotlight.weights_cache.fetch import FetchedSource, Stopped, fetch, fetched_before
from pilotlight.weights_cache.files import FileSystem
from pilotlight.weights_cache.manifest import read_manifest
from pilotlight.weights_cache.sources.http import SUMS_NAME, HttpSource
from pilotlight.weights_cache.sources.local import LocalSource
from pilotlight.weights_cache.sources.parse import parse_source
from pilotlight.weights_cache.store import Store

SMALL_BYTES = 10_000
"""More than configuration, index and answers' headers weigh together."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Nginx]]:
    root = tmp_path_factory.mktemp("fetch")
    with nginx(root, root / "nginx") as server:
        yield root / "model", server


@pytest.fixture
def model(served: tuple[Path, Nginx]) -> Path:
    write_checkpoint(served[0])
    return served[0]


@pytest.fixture
def server(served: tuple[Path, Nginx]) -> Nginx:
    return served[1]


@pytest.fixture
def proxy(server: Nginx) -> Iterator[CuttingProxy]:
    with cutting(server.port) as proxy:
        yield proxy


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


Open = Callable[..., HttpSource]


@pytest.fixture
def opened() -> Iterator[Open]:
    with ExitStack() as stack:

        def open_source(server: Nginx | CuttingProxy, max_failures: int = 5) -> HttpSource:
            source = HttpSource(f"{server.url}/model/", patient(Waits(), max_failures))
            stack.callback(source.close)
            return source

        yield open_source


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_whole(fetched: FetchedSource, model: Path, *, is_tidy: bool = True) -> None:
    """The folder holds the wanted files of `model`, and every blob is what its name says."""
    wanted = {
        name: content
        for name, content in contents_of(model).items()
        if name not in ("evil.py", "pytorch_model.bin", SUMS_NAME)
    }
    assert contents_of(fetched.folder) == wanted
    assert not any(path.is_symlink() for path in fetched.folder.iterdir())
    read_manifest(fetched.folder)
    root = fetched.folder.parents[2]
    blobs = contents_of(root / "blobs")
    assert all(hashlib.sha256(content).hexdigest() == name for name, content in blobs.items())
    assert {file.sha256 for file in fetched.record.files} <= blobs.keys()
    assert not is_tidy or not list((root / "partial").iterdir())


def total_bytes(model: Path) -> int:
    return sum(len(content) for content in contents_of(model).values())


# ---- what a fetch leaves ---------------------------------------------------------------------


def test_a_source_becomes_a_folder_that_loads(
    store: Store, server: Nginx, model: Path, opened: Open
) -> None:
    source = opened(server)
    assert fetched_before(source, store) is None
    fetched = fetch(source, store)
    check_whole(fetched, model)
    assert fetched.folder.name == "model"
    assert fetched.num_bytes_moved == fetched.record.num_bytes == total_bytes(model)
    assert fetched.record.source == source.text
    before = fetched_before(source, store)
    assert before is not None
    assert (before.folder, before.record) == (fetched.folder, fetched.record)


def test_a_view_costs_no_bytes(store: Store, model: Path) -> None:
    fetched = fetch(LocalSource(model), store)
    for file in fetched.record.files:
        assert (fetched.folder / file.name).samefile(store.root / "blobs" / file.sha256)


def test_where_links_are_refused_the_view_is_a_copy(tmp_path: Path, model: Path) -> None:
    class NoLinks(FileSystem):
        def link(self, source: Path, target: Path) -> None:
            raise PermissionError(1, "Operation not permitted")

    fetched = fetch(LocalSource(model), Store(tmp_path / "cache", NoLinks()))
    check_whole(fetched, model)
    assert all(path.stat().st_nlink == 1 for path in fetched.folder.iterdir())


def test_progress_counts_up_to_the_whole(
    store: Store, server: Nginx, model: Path, opened: Open
) -> None:
    seen: list[tuple[int, int]] = []
    fetch(opened(server), store, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (total_bytes(model), total_bytes(model))
    assert {total for _, total in seen} == {total_bytes(model)}


# ---- again -----------------------------------------------------------------------------------


def test_the_same_again_moves_nothing(
    store: Store, proxy: CuttingProxy, model: Path, opened: Open
) -> None:
    first = fetch(opened(proxy), store)
    proxy.cut_after()
    again = fetch(opened(proxy), store)
    assert (again.folder, again.record, again.num_bytes_moved) == (first.folder, first.record, 0)
    assert proxy.num_bytes < SMALL_BYTES


def test_only_what_changed_is_fetched_again(
    store: Store, proxy: CuttingProxy, model: Path, opened: Open
) -> None:
    first = fetch(opened(proxy), store)
    old = contents_of(first.folder)
    with (first.folder / SHARDS[1]).open("rb") as in_use:
        replace_shard(model, seed=1)
        proxy.cut_after()
        fetched = fetch(opened(proxy), store)
        assert in_use.read() == old[SHARDS[1]], "a file in use was overwritten"
    check_whole(fetched, model)
    assert SHARD_BYTES < proxy.num_bytes < SHARD_BYTES + SMALL_BYTES


def test_equal_files_of_two_sources_are_moved_and_kept_once(
    store: Store, proxy: CuttingProxy, server: Nginx, model: Path, opened: Open
) -> None:
    write_checkpoint(model, has_sums=True)
    fetch(opened(server), store)
    proxy.cut_after()
    fetched = fetch(opened(proxy), store)
    check_whole(fetched, model)
    assert proxy.num_bytes < SMALL_BYTES
    assert len(list((store.root / "models").iterdir())) == 2


def test_a_view_that_was_damaged_is_made_again(store: Store, model: Path) -> None:
    fetched = fetch(LocalSource(model), store)
    (fetched.folder / SHARDS[0]).unlink()
    assert fetched_before(LocalSource(model), store) is None
    check_whole(fetch(LocalSource(model), store), model)


@pytest.mark.parametrize("content", [b"", b"not json", b"[]", b'{"files": 3}'])
def test_a_record_that_cannot_be_read_is_written_anew(
    store: Store, model: Path, content: bytes
) -> None:
    slug = fetch(LocalSource(model), store).slug
    (store.root / "sources" / f"{slug}.json").write_bytes(content)
    check_whole(fetch(LocalSource(model), store), model)


# ---- lines that are cut, processes that are killed -------------------------------------------


def test_cut_lines_cost_no_bytes(
    store: Store, proxy: CuttingProxy, model: Path, opened: Open
) -> None:
    proxy.cut_after(*[200_000] * 12)
    check_whole(fetch(opened(proxy), store), model)
    assert proxy.num_cuts == 12
    assert proxy.num_bytes < total_bytes(model) + 2 * SMALL_BYTES


def test_the_next_fetch_goes_on_where_one_gave_up(
    store: Store, proxy: CuttingProxy, model: Path, opened: Open
) -> None:
    source = opened(proxy, max_failures=0)
    proxy.cut_after(SMALL_BYTES + 1_000_000)
    with pytest.raises(SourceError, match="the same command later goes on where it stopped"):
        fetch(source, store, num_parallel=1)
    assert not (store.root / "models").exists() or not list((store.root / "models").iterdir())
    proxy.cut_after()
    fetched = fetch(opened(proxy), store)
    check_whole(fetched, model)
    assert proxy.num_bytes < total_bytes(model) - 900_000
    assert fetched.num_bytes_moved < total_bytes(model) - 900_000


CHILD = """
import sys
from pathlib import Path
from pilotlight.weights_cache import partial
from pilotlight.weights_cache.fetch import fetch
from pilotlight.weights_cache.sources.parse import parse_source
from pilotlight.weights_cache.store import Store
partial.STEP_BYTES = 100_000
show = lambda done, total: print(done, flush=True)
fetch(parse_source(sys.argv[1]), Store(Path(sys.argv[2])), show, num_parallel=1)
"""


def test_a_fetch_that_was_killed_is_continued(
    store: Store, proxy: CuttingProxy, model: Path, opened: Open
) -> None:
    source = opened(proxy)
    proxy.hold_after(SMALL_BYTES + 1_000_000)
    command = [sys.executable, "-c", CHILD, source.text, str(store.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert any(int(line) > 900_000 for line in child.stdout)
        child.send_signal(signal.SIGKILL)
    proxy.release()
    proxy.cut_after()
    check_whole(fetch(source, store), model)
    assert proxy.num_bytes < total_bytes(model) - 700_000


def test_a_part_that_was_damaged_meanwhile_is_not_believed(
    store: Store, proxy: CuttingProxy, model: Path, opened: Open
) -> None:
    proxy.cut_after(SMALL_BYTES + 1_000_000)
    with pytest.raises(SourceError):
        fetch(opened(proxy, max_failures=0), store, num_parallel=1)
    for path in (store.root / "partial").glob("*.part"):
        with path.open("r+b") as file:
            byte = file.read(1)
            file.seek(0)
            file.write(bytes([byte[0] ^ 1]))
            file.seek(0, os.SEEK_END)
            file.write(bytes(2 * SHARD_BYTES))
    check_whole(fetch(opened(proxy), store), model)


@pytest.mark.parametrize("journal", [b"", b"{}", b'{"num_bytes": 99999999, "sha256": ""}', None])
def test_a_part_without_a_journal_is_not_believed(
    store: Store, proxy: CuttingProxy, model: Path, opened: Open, journal: bytes | None
) -> None:
    proxy.cut_after(SMALL_BYTES + 1_000_000)
    with pytest.raises(SourceError):
        fetch(opened(proxy, max_failures=0), store, num_parallel=1)
    for path in (store.root / "partial").glob("*.journal"):
        path.unlink()
        if journal is not None:
            path.write_bytes(journal)
    check_whole(fetch(opened(proxy), store), model)


def test_stop_ends_it_and_keeps_what_is_there(
    store: Store, server: Nginx, model: Path, opened: Open
) -> None:
    stop = threading.Event()
    with pytest.raises(Stopped):
        fetch(opened(server), store, lambda done, _: stop.set() if done > 1_000_000 else None, stop)
    fetched = fetch(opened(server), store)
    check_whole(fetched, model)
    assert fetched.num_bytes_moved < total_bytes(model)


def test_two_at_once_move_the_bytes_once(
    store: Store, proxy: CuttingProxy, model: Path, opened: Open
) -> None:
    results: list[FetchedSource] = []
    sources = [opened(proxy) for _ in range(4)]
    proxy.cut_after()
    threads = [
        threading.Thread(target=lambda s=source: results.append(fetch(s, store)))  # type: ignore[misc]
        for source in sources
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert len(results) == 4
    check_whole(results[0], model)
    assert sum(fetched.num_bytes_moved for fetched in results) == total_bytes(model)


# ---- sources that lie or change --------------------------------------------------------------


def test_bytes_that_are_not_the_published_ones_are_refused(
    store: Store, server: Nginx, model: Path, opened: Open
) -> None:
    write_checkpoint(model, has_sums=True)
    path = model / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(SourceError, match=r"model-2\.safetensors is sha256:.* is published"):
        fetch(opened(server), store, num_parallel=1)
    assert not list((store.root / "partial").iterdir())
    assert hashlib.sha256(path.read_bytes()).hexdigest() not in contents_of(store.root / "blobs")


def test_a_file_that_changes_during_the_fetch_is_listed_again(
    store: Store, server: Nginx, model: Path, opened: Open
) -> None:
    seeds = [1]

    def change(done: int, _total: int) -> None:
        if seeds and done > 200_000:
            replace_shard(model, seeds.pop())

    check_whole(fetch(opened(server), store, change, num_parallel=1), model)
    assert seeds == []


def test_a_file_that_always_changes_is_an_error(
    store: Store, server: Nginx, model: Path, opened: Open
) -> None:
    seeds = iter(range(1, 10_000))

    def change(done: int, _total: int) -> None:
        if 200_000 < done < 400_000:
            replace_shard(model, next(seeds))

    with pytest.raises(SourceError, match="changed while it was read"):
        fetch(opened(server), store, change, num_parallel=1)


# ---- the disk --------------------------------------------------------------------------------


class SmallDisk(FileSystem):
    """A file system that says how much is free, and can fill up."""

    def __init__(self, num_free: int, num_writable: int = 1 << 40) -> None:
        super().__init__()
        self.num_free = num_free
        self.num_writable = num_writable
        self.num_written = 0

    def free_bytes(self, path: Path) -> int:
        return self.num_free

    def pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        self.num_written += len(data)
        if self.num_written > self.num_writable:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().pwrite(descriptor, data, offset)


def test_too_little_room_is_found_before_the_first_byte(tmp_path: Path, model: Path) -> None:
    disk = SmallDisk(num_free=2 * SHARD_BYTES)
    with pytest.raises(NotEnoughDisk, match=r"3200000 bytes free.*`pilotlight cache gc`"):
        fetch(LocalSource(model), Store(tmp_path / "cache", disk))
    assert disk.num_written < 1000


def test_a_disk_that_fills_up_meanwhile_loses_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_module, "STEP_BYTES", 100_000)
    disk = SmallDisk(num_free=1 << 40, num_writable=SHARD_BYTES)
    store = Store(tmp_path / "cache", disk)
    with pytest.raises(NotEnoughDisk, match="is full; make room"):
        fetch(LocalSource(model), store)
    disk.num_writable = 1 << 40
    fetched = fetch(LocalSource(model), store)
    check_whole(fetched, model)


class FailingCalls(FileSystem):
    """Calls of the file system are counted; the one numbered `fails_at` raises. Never syncs."""

    def __init__(self, fails_at: int = 0) -> None:
        self.fails_at = fails_at
        self.num_calls = 0

    def _count(self) -> None:
        self.num_calls += 1
        if self.num_calls == self.fails_at:
            raise OSError(errno.EIO, "Input/output error")

    def open(self, path: Path, flags: int) -> int:
        self._count()
        return super().open(path, flags)

    def pread(self, descriptor: int, num_bytes: int, offset: int) -> bytes:
        self._count()
        return super().pread(descriptor, num_bytes, offset)

    def pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        self._count()
        return super().pwrite(descriptor, memoryview(data)[: len(data) // 2 + 1], offset)

    def fsync(self, descriptor: int) -> None:
        self._count()

    def ftruncate(self, descriptor: int, num_bytes: int) -> None:
        self._count()
        super().ftruncate(descriptor, num_bytes)

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._count()
        super().link(source, target)

    def unlink(self, path: Path, missing_ok: bool = False) -> None:
        self._count()
        super().unlink(path, missing_ok)

    def mkdir(self, folder: Path) -> None:
        self._count()
        super().mkdir(folder)


def test_whatever_call_fails_the_next_fetch_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call in turn, half of every write at a time: an error or a good folder, never else."""
    monkeypatch.setattr(partial_module, "STEP_BYTES", 10_000)
    model = tmp_path / "model"
    write_checkpoint(model, shard_bytes=30_000)
    counted = FailingCalls()
    fetch(LocalSource(model), Store(tmp_path / "counted", counted), num_parallel=1)
    num_failed = 0
    for fails_at in range(1, counted.num_calls + 1):
        root = tmp_path / f"cache-{fails_at}"
        try:
            store = Store(root, FailingCalls(fails_at))
            fetched = fetch(LocalSource(model), store, num_parallel=1)
            check_whole(fetched, model, is_tidy=False)
        except CacheError:
            num_failed += 1
        store = Store(root, FailingCalls())
        check_whole(fetch(LocalSource(model), store), model, is_tidy=False)
    assert num_failed > 50


# ---- other sources ---------------------------------------------------------------------------


def test_from_s3(
    store: Store, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    boto3 = pytest.importorskip("boto3", reason="boto3 of the s3 extra is missing")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with s3_server() as port, cutting(port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        client = boto3.client("s3")
        client.create_bucket(Bucket="models")
        for name, content in contents_of(model).items():
            client.put_object(Bucket="models", Key=f"tiny/{name}", Body=content)
        client.close()
        source = parse_source("s3://models/tiny", patient(Waits()))
        proxy.cut_after(*[300_000] * 5)
        check_whole(fetch(source, store), model)
        source.close()
        assert proxy.num_cuts == 5
