"""Room: from the high watermark to the low one, least recently used first, never what is leased."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
from pilotlight.weights_cache.artefacts import LeasedArena
from pilotlight.weights_cache.eviction import Item, make_room
from pilotlight.weights_cache.files import FileSystem
from pilotlight.weights_cache.records import RecordedFile, SourceRecord
from pilotlight.weights_cache.store import Store

# ---- the policy ----------------------------------------------------------------------------------

THINGS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1000), st.booleans()), max_size=12)


@settings(max_examples=300)
@given(THINGS, st.integers(0, 5000), st.integers(0, 5000))
def test_watermarks(things: list[tuple[int, int, bool]], one: int, other: int) -> None:
    low, high = sorted((one, other))
    sizes = {f"{index:02}": size for index, (_, size, _) in enumerate(things)}
    leased = {f"{index:02}" for index, (_, _, is_leased) in enumerate(things) if is_leased}
    total = sum(sizes.values())
    order: list[str] = []

    def remove(name: str) -> bool:
        order.append(name)
        return name not in leased and sizes.pop(name) >= 0

    items = [
        Item(f"{index:02}", float(used_at), lambda n=f"{index:02}": remove(n))  # type: ignore[misc]
        for index, (used_at, _, _) in enumerate(things)
    ]
    done = make_room(items, lambda: sum(sizes.values()), high, low)

    assert (done.num_bytes_before, done.num_bytes_after) == (total, sum(sizes.values()))
    assert leased <= sizes.keys()
    assert set(done.kept_in_use) <= leased
    if total <= high:
        assert order == []
    by_use = sorted((things[int(i.name)][0], i.name) for i in items)
    assert order == [name for _, name in by_use][: len(order)]
    if total > high and done.num_bytes_after > low:
        assert sizes.keys() == leased, "all that may go is gone"
    if done.removed:
        last = things[int(done.removed[-1])][1]
        assert done.num_bytes_after + last > low, "the last one had to go as well"


# ---- the store -----------------------------------------------------------------------------------


def publish(store: Store, seed: int) -> None:
    store.publish_arena(key_of(seed), Builder(seed), SPECS, ABOUT, CHUNK_BYTES)


def use(store: Store, seed: int, at: int) -> None:
    """As if the file system's clock had shown `at`."""
    os.utime(store.root / "arenas" / key_of(seed) / "used", (at, at))


def seeds(store: Store) -> set[int]:
    return {int(arena.key, 16) for arena in store.arenas()}


def found(store: Store, seed: int) -> LeasedArena:
    leased = store.find_arena(key_of(seed))
    assert leased is not None
    return leased


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def one_bytes(store: Store) -> int:
    publish(store, 0)
    (arena,) = store.arenas()
    assert store.num_bytes() == arena.num_bytes
    assert store.remove(key_of(0))
    return arena.num_bytes


def test_the_least_recently_used_goes_first(store: Store, one_bytes: int) -> None:
    for seed in range(5):
        publish(store, seed)
        use(store, seed, 100 + (seed * 3) % 5)
    assert store.collect_garbage(5 * one_bytes, 0).removed == ()
    done = store.collect_garbage(4 * one_bytes, 3 * one_bytes)
    assert done.removed == (f"arenas/{key_of(0)}", f"arenas/{key_of(2)}")
    assert done.num_bytes_after == 3 * one_bytes
    assert seeds(store) == {1, 3, 4}


def test_finding_is_using(store: Store, one_bytes: int) -> None:
    for seed in range(3):
        publish(store, seed)
        use(store, seed, 100 + seed)
    found(store, 0).close()
    store.collect_garbage(2 * one_bytes, 2 * one_bytes)
    assert seeds(store) == {0, 2}


def test_what_is_leased_stays_whatever_the_watermark(store: Store, one_bytes: int) -> None:
    for seed in range(3):
        publish(store, seed)
    with found(store, 1) as leased:
        done = store.collect_garbage(0, 0)
        assert done.kept_in_use == (f"arenas/{key_of(1)}",)
        assert seeds(store) == {1}
        assert done.num_bytes_after == one_bytes
        assert read_all(leased.arena) == contents(1)
    assert store.collect_garbage(0, 0).num_bytes_after == 0


@pytest.mark.parametrize("is_late", [False, True])
def test_a_lease_taken_while_it_is_evicted(tmp_path: Path, is_late: bool) -> None:
    """Before the rename it is opened, and brought back; after it, it is missed, and gone."""
    got: list[LeasedArena | None] = []

    class Racing(FileSystem):
        def rename(self, source: Path, target: Path) -> None:
            is_eviction = source.parent.name == "arenas" and target.parent.name == "trash"
            if is_eviction and not is_late:
                got.append(loader.find_arena(key_of(1)))
            super().rename(source, target)
            if is_eviction and is_late:
                got.append(loader.find_arena(key_of(1)))

    here = machine()
    loader = Store(tmp_path, world=here.start().world)
    evictor = Store(tmp_path, Racing(), here.start().world)
    publish(loader, 1)
    evictor.collect_garbage(0, 0)
    (leased,) = got
    if is_late:
        assert leased is None
        assert seeds(loader) == set()
    else:
        assert leased is not None
        assert read_all(leased.arena) == contents(1)
        assert os.fstat(leased.arena.descriptor).st_nlink == 1, "it is still on the disk"
        assert seeds(loader) == {1}
        leased.close()
    assert not list((tmp_path / "trash").iterdir())


def test_an_evictor_killed_in_between_loses_nothing(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    class Dying(FileSystem):
        def rename(self, source: Path, target: Path) -> None:
            super().rename(source, target)
            if target.parent.name == "trash":
                raise Killed

    here = machine()
    evicting = here.start()
    evictor = Store(tmp_path, Dying(), evicting.world)
    publish(evictor, 1)
    with pytest.raises(Killed):
        evictor.collect_garbage(0, 0)
    assert seeds(evictor) == set()
    evicting.kill()
    loader = Store(tmp_path, world=here.start().world)
    with found(loader, 1) as leased:
        assert read_all(leased.arena) == contents(1)
    assert not list((tmp_path / "trash").iterdir())


# ---- what else takes room ------------------------------------------------------------------------


class Stopped(Exception):
    pass


def begin(store: Store, seed: int) -> None:
    def stop(_writer: object) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        store.publish_arena(key_of(seed), stop, SPECS, ABOUT, CHUNK_BYTES)


def test_unfinished_work_goes_first_but_only_for_room(store: Store, one_bytes: int) -> None:
    publish(store, 1)
    begin(store, 2)
    (store.root / "partial" / "x.part").write_bytes(b"half of a file")
    total = store.num_bytes()
    assert store.collect_garbage(total, 0).removed == ()
    done = store.collect_garbage(total - 1, one_bytes)
    assert done.removed == (f"partial/arena-{key_of(2)}", "partial/x.part")
    assert seeds(store) == {1}


def test_work_that_somebody_is_at_stays(store: Store) -> None:
    def collect(_writer: object) -> None:
        done = Store(store.root).collect_garbage(0, 0)
        assert done.kept_in_use == (f"partial/arena-{key_of(2)}", "partial/x.part")

    (store.root / "partial" / "x.part").write_bytes(b"half of a file")
    with store.claim("source-x"), pytest.raises(ValueError, match="not whole yet"):
        store.publish_arena(key_of(2), collect, SPECS, ABOUT, CHUNK_BYTES)


def add_source(store: Store, slug: str, *names: str) -> None:
    """Blobs called by a digit each, of as many bytes."""
    recorded = []
    for name in names:
        aside = store.root / "partial" / name
        aside.write_bytes(b"x" * int(name))
        store.publish_blob(aside, name * 64)
        recorded.append(RecordedFile(name, name * 64, int(name)))
    store.write_record(slug, SourceRecord(slug, "", tuple(recorded)))
    (store.root / "models" / slug).mkdir()
    for name in names:
        os.link(store.blob_path(name * 64), store.root / "models" / slug / name)


def test_a_source_goes_with_the_blobs_that_are_its_alone(store: Store) -> None:
    add_source(store, "a", "1", "2")
    add_source(store, "b", "2", "4")
    assert store.num_bytes() == 7
    for at, slug in enumerate("ab"):
        os.utime(store.root / "sources" / f"{slug}.json", (at, at))
    done = store.collect_garbage(6, 6)
    assert done.removed == ("sources/a",)
    assert done.num_bytes_after == 6
    assert [source.slug for source in store.sources()] == ["b"]


def test_a_leased_source_stays_and_counts_as_used(store: Store) -> None:
    add_source(store, "a", "1")
    add_source(store, "b", "2")
    for slug in "ab":
        os.utime(store.root / "sources" / f"{slug}.json", (1, 1))
    with store.lease("source-a"):
        assert not store.remove_source("a")
        assert store.collect_garbage(2, 2).removed == ("sources/b",)
    assert store.sources()[0].used_at > 1
    assert store.remove_source("a")
    assert store.num_bytes() == 0


def test_blobs_and_views_that_nobody_names_go_unless_somebody_fetches(store: Store) -> None:
    add_source(store, "a", "1", "2")
    (store.root / "sources" / "a.json").unlink()
    (store.root / "partial" / "a.view-1").mkdir()
    with store.claim("source-a"):
        assert store.collect_garbage(1 << 40, 0).num_bytes_after == 3
    assert store.collect_garbage(1 << 40, 0).num_bytes_after == 0
    assert not list((store.root / "models").iterdir())
    assert not list((store.root / "partial").iterdir())


def test_a_fetch_that_begins_while_blobs_are_swept(tmp_path: Path) -> None:
    entered: list[object] = []

    class Racing(FileSystem):
        def rename(self, source: Path, target: Path) -> None:
            super().rename(source, target)
            if source.parent.name == "blobs" and not entered:
                claim = fetching.claim("source-a")
                claim.__enter__()
                entered.append(claim)

    fetching = Store(tmp_path, world=machine("a", Clock()).start().world)
    sweeping = Store(tmp_path, Racing())
    add_source(sweeping, "a", "1", "2")
    (tmp_path / "sources" / "a.json").unlink()
    sweeping.collect_garbage(1 << 40, 0)
    assert entered
    assert fetching.has_blob("1" * 64, 1), "it was brought back"
