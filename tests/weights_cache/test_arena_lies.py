"""Files that are no arena, or no longer: every lie in a header and every damaged byte is found."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
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
from pilotlight.weights_cache.arena import (
    BLOCK_BYTES,
    MAGIC,
    MAX_HEADER_BYTES,
    PREFIX,
    SECTION_BYTES,
    decode_header,
    read_arena,
)
from pilotlight.weights_cache.arena_writer import ArenaWriter
from pilotlight.weights_cache.verify import verify_chunks

NOWHERE = Path("arena")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "arena"
    with ArenaWriter(path, key_of(1), SPECS, ABOUT, chunk_bytes=CHUNK_BYTES) as writer:
        Builder()(writer)
    return path.read_bytes()


def header_of(data: bytes) -> dict[str, Any]:
    _, num_bytes, _ = PREFIX.unpack(data[: PREFIX.size])
    header = msgspec.json.decode(data[PREFIX.size : PREFIX.size + num_bytes])
    assert isinstance(header, dict)
    return header


def raw_of(header: object) -> bytes:
    return padded(msgspec.json.encode(header))


def padded(raw: bytes) -> bytes:
    return raw.ljust(-(-(PREFIX.size + len(raw)) // BLOCK_BYTES) * BLOCK_BYTES - PREFIX.size)


def with_header(data: bytes, raw: bytes) -> bytes:
    """The file with another header, hashed as it should be."""
    start = PREFIX.pack(MAGIC, len(raw), xxhash.xxh3_128_digest(raw)) + raw
    return start + data[len(start) :]


# ---- lies ----------------------------------------------------------------------------------------


def tensor(index: int, **changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["tensors"][index].update(changes)


def top(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.update(changes)


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": top(format=2),
    "an unknown field": top(extra=1),
    "a missing field": lambda header: header.pop("about"),
    "no key": top(key=""),
    "no chunks": top(chunk_bytes=0),
    "chunks that are no blocks": top(chunk_bytes=CHUNK_BYTES + 1),
    "larger chunks": top(chunk_bytes=2 * CHUNK_BYTES),
    "huge chunks": top(chunk_bytes=1 << 40),
    "negative chunks": top(chunk_bytes=-CHUNK_BYTES),
    "data elsewhere": top(data_offset=2 * SECTION_BYTES),
    "data in the header": top(data_offset=0),
    "more data": top(data_bytes=4 * BLOCK_BYTES),
    "less data": top(data_bytes=2 * BLOCK_BYTES),
    "no data": top(data_bytes=0, chunk_hashes=[], tensors=[]),
    "a hash too many": lambda header: header["chunk_hashes"].append("0" * 32),
    "a hash too few": lambda header: header["chunk_hashes"].pop(),
    "a hash that is none": lambda header: header["chunk_hashes"].__setitem__(0, "g" * 32),
    "a long hash": lambda header: header["chunk_hashes"].__setitem__(0, "0" * 33),
    "about that is no text": top(about={"a": 1}),
    "a tensor less": lambda header: header["tensors"].pop(),
    "tensors in another order": lambda header: header["tensors"].reverse(),
    "a name that appears twice": tensor(0, name="tensor.1"),
    "no name": tensor(0, name=""),
    "an unknown dtype": tensor(0, dtype="U7"),
    "a wider dtype": tensor(0, dtype="BF16"),
    "another shape": tensor(0, shape=[2, 700]),
    "a negative shape": tensor(0, shape=[-3, -700]),
    "a shape beyond 64 bits": tensor(0, shape=[1 << 70, 0]),
    "a shape that wraps at 64 bits": tensor(0, shape=[1 << 61, 1 << 61, 1 << 61]),
    "a shape of fractions": tensor(0, shape=[3.5, 600]),
    "too many dimensions": tensor(0, shape=[1] * 9),
    "a tensor outside": tensor(4, offset=1 << 40),
    "a tensor that overlaps": tensor(1, offset=64),
    "a tensor that is not aligned": tensor(1, offset=2101),
    "a hole": tensor(1, offset=2112 + 64),
    "a negative offset": tensor(0, offset=-64),
    "more bytes than its shape": tensor(0, num_bytes=2101),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_in_the_header_is_refused(good: bytes, tmp_path: Path, lie: str) -> None:
    header = header_of(good)
    LIES[lie](header)
    (tmp_path / "arena").write_bytes(with_header(good, raw_of(header)))
    with pytest.raises(BadArtefact):
        read_arena(tmp_path / "arena")


def test_the_helper_that_lies_can_tell_the_truth(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "arena").write_bytes(with_header(good, raw_of(header_of(good))))
    with read_arena(tmp_path / "arena") as arena:
        assert verify_chunks(arena)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.replace(b'{"format":1', b'{"format":1,"format":1'),
        lambda raw: raw.replace(b'"key":', b'"key": '),
        lambda raw: raw.replace(b'"tensor.0"', b'"\\u0074ensor.0"'),
        lambda raw: raw + b" " * BLOCK_BYTES,
        lambda raw: raw.rstrip(),
        lambda raw: raw + b"{}",
        lambda raw: b"[" * 10_000,
        lambda raw: b"\xff\xfe",
        lambda raw: b"",
        lambda raw: b"null",
    ],
)
def test_a_header_that_no_writer_writes_is_refused(
    good: bytes, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    raw = change(raw_of(header_of(good)).rstrip())
    raw = raw if raw.endswith(b"}") and len(raw) % 64 else padded(raw)
    (tmp_path / "arena").write_bytes(with_header(good, raw))
    with pytest.raises(BadArtefact):
        read_arena(tmp_path / "arena")


@pytest.mark.parametrize("claimed", [0, 1, MAX_HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1])
def test_the_headers_length_is_not_believed(good: bytes, tmp_path: Path, claimed: int) -> None:
    prefix = PREFIX.pack(MAGIC, claimed, good[16 : PREFIX.size])
    (tmp_path / "arena").write_bytes(prefix + good[PREFIX.size :])
    with pytest.raises(BadArtefact):
        read_arena(tmp_path / "arena")


def test_what_is_not_there_or_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(BadArtefact, match="cannot be read"):
            read_arena(path)


# ---- fuzz ----------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | JSON.map(msgspec.json.encode))
def test_any_header_is_refused_by_its_type(raw: bytes) -> None:
    with pytest.raises(BadArtefact):
        decode_header(padded(raw), 3 * SECTION_BYTES, NOWHERE)


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_any_one_change_of_the_header_is_refused(good: bytes, data: st.DataObject) -> None:
    header = header_of(good)
    place: Any = header
    name: Any = data.draw(st.sampled_from(sorted(set(header) - {"about", "key"})))
    while isinstance(place[name], dict | list):
        place = place[name]
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        name = data.draw(st.sampled_from(list(keys)))
    before = place[name]
    place[name] = data.draw(JSON)
    file_bytes = data.draw(st.sampled_from([len(good)] * 3 + [len(good) + BLOCK_BYTES]))
    is_harmless = place[name] == before and type(place[name]) is type(before)
    is_name = name in ("name", "layout") and isinstance(place[name], str) and place[name]
    is_hash = isinstance(name, int) and isinstance(before, str)
    if (is_harmless or is_name or is_hash) and file_bytes == len(good):
        return  # a name is what it is; hashes are proven by the data
    with pytest.raises(BadArtefact):
        decode_header(raw_of(header), file_bytes, NOWHERE)


def test_a_file_cut_anywhere_is_refused(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "arena"
    randoms = random.Random(1)
    cuts = [0, 1, 7, 8, 31, 32, 33, BLOCK_BYTES, SECTION_BYTES, len(good) - 1]
    path.write_bytes(good)
    for cut in sorted(cuts + randoms.choices(range(len(good)), k=60), reverse=True):
        with path.open("r+b") as file:
            file.truncate(cut)
        with pytest.raises(BadArtefact):
            read_arena(path)


def test_bytes_behind_the_end_are_refused(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "arena").write_bytes(good + b"\0")
    with pytest.raises(BadArtefact):
        read_arena(tmp_path / "arena")


def test_a_flipped_bit_anywhere_is_found(good: bytes, tmp_path: Path) -> None:
    """In the header when it is opened, in the data when it is verified; between lies nothing."""
    path = tmp_path / "arena"
    path.write_bytes(good)
    header_bytes = PREFIX.size + PREFIX.unpack(good[: PREFIX.size])[1]
    randoms = random.Random(2)
    with path.open("r+b", buffering=0) as file:
        for number in range(600):
            first, last = [(0, header_bytes), (SECTION_BYTES, len(good)), (0, len(good))][
                number % 3
            ]
            at, bit = randoms.randrange(first, last), 1 << randoms.randrange(8)
            write_at(file, at, bytes([good[at] ^ bit]))
            is_in_hole = header_bytes <= at < SECTION_BYTES
            assert is_refused(path) is not is_in_hole
            write_at(file, at, good[at : at + 1])
    assert not is_refused(path)


def write_at(file: Any, at: int, data: bytes) -> None:
    file.seek(at)
    file.write(data)


def is_refused(path: Path) -> bool:
    try:
        with read_arena(path) as arena:
            verify_chunks(arena)
            assert read_all(arena) == contents()
    except BadArtefact:
        return True
    return False
