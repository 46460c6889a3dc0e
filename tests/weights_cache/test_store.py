"""The store's face: what is published is found, what is damaged is built anew, what is read-only
serves; plans and digests are what was written or nothing."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest
from pilotlight.engine.errors import BadArtefact, CacheError, NotEnoughDisk
from pilotlight.tests.weights_cache.fake_world import (
    ABOUT,
    CHUNK_BYTES,
    SPECS,
    Builder,
    contents,
    key_of,
    read_all,
    settle,
)
from pilotlight.weights_cache import checked
from pilotlight.weights_cache.arena import SECTION_BYTES
from pilotlight.weights_cache.artefacts import LeasedArena
from pilotlight.weights_cache.digests import SETTLE_NS
from pilotlight.weights_cache.files import FileSystem
from pilotlight.weights_cache.keys import artefact_key
from pilotlight.weights_cache.store import Store, Version
from pilotlight.weights_cache.verify import verify_chunks

KEY = key_of(1)
LIMIT_S = 30.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def publish(store: Store, seed: int = 1, builder: Builder | None = None) -> Path:
    builder = builder or Builder(seed)
    return store.publish_arena(key_of(seed), builder, SPECS, ABOUT, CHUNK_BYTES)


def found(store: Store, seed: int = 1) -> LeasedArena:
    leased = store.find_arena(key_of(seed))
    assert leased is not None
    return leased


def check_good(store: Store, seed: int = 1) -> None:
    with found(store, seed) as leased:
        assert verify_chunks(leased.arena)
        assert read_all(leased.arena) == contents(seed)


# ---- publishing and finding ----------------------------------------------------------------------


def test_what_is_published_is_found(store: Store) -> None:
    assert store.find_arena(KEY) is None
    path = publish(store)
    assert path == store.root / "arenas" / KEY / "arena.bin"
    check_good(store)
    assert store.find_arena(key_of(2)) is None
    (record,) = store.arenas()
    assert (record.key, record.num_bytes, record.about) == (KEY, path.stat().st_size, ABOUT)
    assert not list((store.root / "partial").iterdir())


def test_publishing_again_builds_nothing(store: Store) -> None:
    builder = Builder(1)
    before = publish(store, builder=builder).stat()
    after = publish(Store(store.root), builder=builder).stat()
    assert builder.num_builds == 1
    assert before.st_ino == after.st_ino


def test_a_lease_lasts_until_it_is_closed(store: Store) -> None:
    publish(store)
    with found(store), found(store):
        assert store.arenas()[0].num_leases == 2
        assert not store.remove(KEY)
    assert store.arenas()[0].num_leases == 0
    assert store.remove(KEY)
    assert store.remove(KEY), "it is gone already"
    assert store.arenas() == []
    assert store.num_bytes() == 0


@pytest.mark.parametrize("key", ["", "..", "a/b", ".hidden", "a~b", "x" * 129])
def test_a_key_is_a_plain_name(store: Store, key: str) -> None:
    with pytest.raises(ValueError, match="is no key"):
        store.find_arena(key)
    with pytest.raises(ValueError, match="is no key"):
        store.publish_arena(key, Builder(), SPECS, ABOUT)


def test_what_the_builder_raises_comes_out(store: Store) -> None:
    def fail(_writer: object) -> None:
        raise FileNotFoundError("the source is gone")

    with pytest.raises(FileNotFoundError, match="the source is gone"):
        store.publish_arena(KEY, fail, SPECS, ABOUT)
    publish(store)
    check_good(store)


def test_every_part_of_a_key_makes_another_key() -> None:
    base = ({"a": "1"}, "c", "bfloat16", "none", 3, "cpu-amx")
    others = [
        ({"b": "1"}, *base[1:]),
        ({"a": "2"}, *base[1:]),
        *((*base[:i], 4 if i == 4 else "x", *base[i + 1 :]) for i in range(1, 6)),
        (*base, 0, 2),
        (*base, 1, 2),
    ]
    keys = {artefact_key(*parts) for parts in (base, *others)}  # type: ignore[arg-type]
    assert len(keys) == 1 + len(others)
    assert artefact_key({"a": "1", "b": "2"}, *base[1:]) == artefact_key(
        {"b": "2", "a": "1"}, *base[1:]
    )
    assert artefact_key(*base) == artefact_key(*base, 0, 1)


# ---- damage --------------------------------------------------------------------------------------


def damage(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 4]))


def test_a_damaged_header_is_a_miss_and_built_anew(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    damage(publish(store), 50)
    assert store.find_arena(KEY) is None
    assert "is damaged" in caplog.text
    publish(store)
    check_good(store)
    store.collect_garbage(1 << 40, 1 << 40)
    assert not list((store.root / "trash").iterdir())


def test_damaged_data_are_found_by_verifying_and_built_anew(store: Store) -> None:
    damage(publish(store), SECTION_BYTES + 5)
    heard: list[BadArtefact] = []
    with found(store) as bad:
        with pytest.raises(BadArtefact, match="chunk 0"):
            bad.verification(on_failure=heard.append).start().wait(LIMIT_S)
        assert len(heard) == 1
        assert store.find_arena(KEY) is None, "nobody else finds it"
        publish(store)
        check_good(store)
        bad.condemn()
        check_good(store)  # the good one is not condemned in its place
        store.collect_garbage(1 << 40, 1 << 40)
        assert os.fstat(bad.arena.descriptor).st_nlink == 1, "what is leased is not deleted"
    store.collect_garbage(1 << 40, 1 << 40)
    assert not list((store.root / "trash").iterdir())
    check_good(store)


def test_an_artefact_of_another_key_is_a_miss(store: Store) -> None:
    publish(store, 2)
    (store.root / "arenas" / key_of(2)).rename(store.root / "arenas" / KEY)
    assert store.find_arena(KEY) is None
    publish(store)
    check_good(store)


@pytest.mark.parametrize("names", [[], ["plan.json"], ["used", "arena.bin"]])
def test_a_folder_without_an_artefact_is_replaced(store: Store, names: list[str]) -> None:
    (store.root / "arenas" / KEY).mkdir()
    for name in names:
        (store.root / "arenas" / KEY / name).write_bytes(b"debris")
    assert store.find_arena(KEY) is None
    publish(store)
    check_good(store)


def test_folders_that_somebody_removed_are_made_again(store: Store) -> None:
    publish(store)
    for name in ("partial", "trash", "claims"):
        (store.root / name).rmdir()
    again = Store(store.root)
    publish(again, 2)
    check_good(again, 2)


# ---- roots ---------------------------------------------------------------------------------------


class ReadOnly(FileSystem):
    """A mounted volume, an image layer; a chmod would not stop root."""

    def open(self, path: Path, flags: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(30, "Read-only file system")
        return super().open(path, flags)

    def is_writable(self, folder: Path) -> bool:
        return False

    def mkdir(self, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    rename = link = touch = unlink = rmdir = mkdir


def test_a_root_that_cannot_be_written_serves(store: Store) -> None:
    publish(store)
    store.write_plan(KEY, b"{}")
    before = sorted(store.root.rglob("*"))
    reader = Store(store.root, ReadOnly())
    assert not reader.is_writable
    check_good(reader)
    with found(reader) as leased:
        assert not leased.is_leased
        leased.condemn()
    assert reader.read_plan(KEY) == b"{}"
    assert [arena.key for arena in reader.arenas()] == [KEY]
    reader.write_plan(KEY, b"[]")
    reader.remember_digest(leased.path, "0" * 64)
    for refused in (
        lambda: reader.publish_arena(key_of(2), Builder(), SPECS, ABOUT),
        lambda: reader.remove(KEY),
        lambda: reader.collect_garbage(0, 0),
        lambda: reader.claim("x").__enter__(),
    ):
        with pytest.raises(CacheError, match="cannot be written"):
            refused()
    assert sorted(store.root.rglob("*")) == before
    assert store.read_plan(KEY) == b"{}"


def test_a_root_that_cannot_be_made_is_empty(tmp_path: Path) -> None:
    reader = Store(tmp_path / "none", ReadOnly())
    assert not reader.is_writable
    assert reader.find_arena(KEY) is None
    assert (reader.arenas(), reader.sources(), reader.num_bytes()) == ([], [], 0)
    assert not (tmp_path / "none").exists()


def test_a_root_that_is_a_file_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert not Store(tmp_path / "file").is_writable


def test_another_version_is_refused_and_a_damaged_one_repaired(store: Store) -> None:
    publish(store)
    path = store.root / "VERSION"
    damage(path, 20)
    check_good(Store(store.root))
    assert checked.read(store.files, path, Version) == Version(1)
    path.write_bytes(checked.encode(Version(2)))
    with pytest.raises(CacheError, match="of version 2, this is version 1"):
        Store(store.root)


def test_too_little_room_is_an_error_that_says_so(tmp_path: Path) -> None:
    class Small(FileSystem):
        def free_bytes(self, path: Path) -> int:
            return 1000

    store = Store(tmp_path, Small())
    with pytest.raises(NotEnoughDisk, match="1000 bytes free"):
        publish(store)
    assert store.free_bytes() == 1000


def test_nothing_but_the_owner_may_write(store: Store) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(publish(store).stat().st_mode) == 0o644 & ~mask


# ---- plans ---------------------------------------------------------------------------------------


def test_a_plan_is_what_was_written_or_nothing(store: Store) -> None:
    store.write_plan(KEY, b"{}")
    assert store.read_plan(KEY) is None, "there is no artefact to lie beside"
    publish(store)
    plan = b'{"kv_blocks": 100, "graphs": [1, 2, 4]}'
    store.write_plan(KEY, plan)
    assert store.read_plan(KEY) == plan
    path = store.root / "arenas" / KEY / "plan.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert store.read_plan(KEY) in (None, plan)
        path.write_bytes(whole[:at])
        assert store.read_plan(KEY) is None
    store.remove(KEY)
    publish(store)
    assert store.read_plan(KEY) is None, "it went with its artefact"


def test_a_plan_is_json(store: Store) -> None:
    publish(store)
    with pytest.raises(ValueError, match="not JSON"):
        store.write_plan(KEY, b"{not")


# ---- digests of local files ----------------------------------------------------------------------


def test_a_digest_is_of_the_file_as_it_is(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    assert store.digest_of(path) is None
    store.remember_digest(path, "1" * 64)
    assert store.digest_of(path) is None, "it may change in the same tick of the clock"
    settle(store)
    assert store.digest_of(path) == "1" * 64
    path.write_bytes(b"two")
    assert store.digest_of(path) is None
    path.unlink()
    assert store.digest_of(path) is None


def test_a_file_in_its_place_is_another_even_if_it_looks_the_same(
    store: Store, tmp_path: Path
) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"one")
    other.write_bytes(b"two")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    store.remember_digest(path, "1" * 64)
    settle(store)
    other.rename(path)
    assert store.digest_of(path) is None


def test_hashing_happens_once(store: Store, tmp_path: Path) -> None:
    path, seen = tmp_path / "a", []
    path.write_bytes(b"abc" * 1_000_000)
    digest = store.sha256_of(path, seen.append)
    assert seen[-1] == 3_000_000
    settle(store)
    assert store.sha256_of(path, lambda _num: pytest.fail("hashed again")) == digest
    path.write_bytes(b"other")
    assert store.sha256_of(path) != digest
    store.collect_garbage(1 << 40, 0)
    assert len(list((store.root / "digests").iterdir())) == 1, "the old one was forgotten"


def test_a_damaged_digest_is_forgotten(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    store.remember_digest(path, "1" * 64)
    settle(store)
    (record,) = (store.root / "digests").iterdir()
    damage(record, record.read_bytes().index(b"1" * 64))
    at = record.stat().st_mtime_ns + SETTLE_NS
    os.utime(record, ns=(at, at))
    assert store.digest_of(path) is None


def test_what_cannot_be_written_is_only_not_remembered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(FileSystem):
        is_full = False

        def pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
            if self.is_full:
                raise OSError(28, "No space left on device")
            return super().pwrite(descriptor, data, offset)

    files = Full()
    store = Store(tmp_path / "cache", files)
    publish(store)
    files.is_full = True
    caplog.set_level(logging.INFO)
    store.write_plan(KEY, b"{}")
    assert "cannot be written" in caplog.text
    store.remember_digest(tmp_path, "1" * 64)
    check_good(store)
    assert not list(store.root.rglob("*.aside"))
