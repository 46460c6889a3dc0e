"""safetensors files that are right, and every way in which one can be wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pilotlight.bench.make_model import write_model
from pilotlight.engine.errors import CheckpointError
from pilotlight.engine.models.config import read_model_config
from pilotlight.engine.models.names import check_tensors
from pilotlight.weights_cache.manifest import INDEX_NAME, SINGLE_NAME, Manifest, read_manifest
from safetensors.torch import save_file


def entry(shape: list[Any], start: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write_raw(path: Path, header: bytes, num_data_bytes: int) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(num_data_bytes))
    return path


def write_file(path: Path, header: dict[str, Any], num_data_bytes: int) -> Path:
    return write_raw(path, json.dumps(header).encode(), num_data_bytes)


def check_refusal(read: Callable[[], object], *named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read()
    message = str(caught.value)
    assert all(part in message for part in named), message
    assert "\n" not in message


# ---- one file --------------------------------------------------------------------------------

GOOD = {"a": entry([2], 0, 8), "b": entry([1, 2], 8, 16)}

BAD_LAYOUTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "hole": (GOOD | {"b": entry([1, 2], 12, 20)}, 20, "b leaves a hole"),
    "hole at the start": ({"a": entry([2], 4, 12)}, 12, "a leaves a hole"),
    "overlap": (GOOD | {"b": entry([1, 2], 4, 12)}, 12, "b overlaps"),
    "same bytes twice": (GOOD | {"b": entry([1, 2], 0, 8)}, 8, "b overlaps"),
    "past the end": (GOOD, 15, "truncated"),
    "bytes behind": (GOOD, 17, "1 bytes behind"),
    "no tensors but bytes": ({}, 4, "4 bytes behind"),
    "shape and span disagree": ({"a": entry([3], 0, 8)}, 8, "a of shape [3]"),
    "dtype and span disagree": ({"a": entry([2], 0, 8, "F16")}, 8, "a of shape [2]"),
    "negative span": ({"a": entry([2], 8, 0)}, 8, "a of shape [2]"),
    "negative offset": ({"a": entry([2], -8, 0)}, 0, "a has a shape or offset"),
    "negative sizes": ({"a": entry([-1, -2], 0, 8)}, 8, "a has a shape or offset"),
    "fractional size": ({"a": entry([2.0], 0, 8)}, 8, "a has a shape or offset"),
    "boolean size": ({"a": entry([True], 0, 4)}, 4, "a has a shape or offset"),
    "text as offset": ({"a": entry([2], 0, "8")}, 8, "a has a shape or offset"),
    "size of 2**63": ({"a": entry([2**63, 0], 0, 0)}, 0, "a has a shape or offset"),
    "unknown dtype": ({"a": entry([2], 0, 8, "F31")}, 8, "a has the unknown dtype 'F31'"),
    "dtype that is no name": ({"a": entry([2], 0, 8) | {"dtype": ["F32"]}}, 8, "a has the unknown"),
    "shape that is no list": ({"a": entry([2], 0, 8) | {"shape": 2}}, 8, "a has a shape or offset"),
    "shape that is an object": ({"a": entry([], 0, 4) | {"shape": {}}}, 4, "a has a shape"),
    "three offsets": ({"a": entry([2], 0, 8) | {"data_offsets": [0, 4, 8]}}, 8, "entry of a"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "entry of a"),
    "entry that is no object": ({"a": 7}, 0, "entry of a"),
}


@pytest.mark.parametrize("case", BAD_LAYOUTS)
def test_a_header_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    header, num_data_bytes, reason = BAD_LAYOUTS[case]
    path = write_file(tmp_path / SINGLE_NAME, header, num_data_bytes)
    check_refusal(lambda: read_manifest(tmp_path), str(path), reason)


BAD_HEADERS: dict[str, bytes] = {
    "no JSON": b"not json",
    "no object": b"[1, 2]",
    "no UTF-8": b'{"\xff": 1}',
    "too deep": b"[" * 100_000,
    "a name twice": b'{"a": 1, "a": 1}',
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_header_that_is_no_header_is_refused(tmp_path: Path, case: str) -> None:
    path = write_raw(tmp_path / SINGLE_NAME, BAD_HEADERS[case], 0)
    check_refusal(lambda: read_manifest(tmp_path), str(path), "not a safetensors file")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a safetensors file"),
        (b"\x01\x00", "not a safetensors file"),
        (b"PK\x03\x04 this was a pickle once", "not a safetensors file"),
        (struct.pack("<Q", 100_000_001), "not a safetensors file"),
        (struct.pack("<Q", 40) + b"{}", "truncated"),
    ],
)
def test_garbage_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(content)
    check_refusal(lambda: read_manifest(tmp_path), str(tmp_path / SINGLE_NAME), reason)


def test_every_truncation_of_a_real_file_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3, 2), "v": torch.ones(2)}, tmp_path / SINGLE_NAME)
    whole = (tmp_path / SINGLE_NAME).read_bytes()
    for num_bytes in range(len(whole)):
        (tmp_path / SINGLE_NAME).write_bytes(whole[:num_bytes])
        check_refusal(lambda: read_manifest(tmp_path), SINGLE_NAME)


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere; a model is"):
        read_manifest(tmp_path / "nowhere")


def test_other_formats_are_named(tmp_path: Path) -> None:
    check_refusal(lambda: read_manifest(tmp_path), str(tmp_path), SINGLE_NAME, INDEX_NAME)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    check_refusal(lambda: read_manifest(tmp_path), "pytorch_model.bin", "safetensors")


# ---- several files ---------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards of two tensors each, described by an index."""
    weight_map = {}
    for shard in ("1", "2"):
        names = [f"{letter}{shard}" for letter in "ab"]
        save_file({name: torch.ones(2) for name in names}, tmp_path / f"{shard}.safetensors")
        weight_map |= dict.fromkeys(names, f"{shard}.safetensors")
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def _change_index(folder: Path, **changes: object) -> None:
    path = folder / INDEX_NAME
    weight_map = json.loads(path.read_text())["weight_map"] | changes
    kept = {name: file for name, file in weight_map.items() if file != ""}
    path.write_text(json.dumps({"weight_map": kept}))


def test_all_shards_are_read(sharded: Path) -> None:
    spans = read_manifest(sharded).tensors
    assert {name: span.file.name for name, span in spans.items()} == {
        "a1": "1.safetensors", "b1": "1.safetensors", "a2": "2.safetensors", "b2": "2.safetensors",
    }  # fmt: skip


def test_the_index_wins_over_a_single_file(sharded: Path) -> None:
    save_file({"other": torch.ones(1)}, sharded / SINGLE_NAME)
    assert "other" not in read_manifest(sharded).tensors


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"a1": "absent.safetensors"}, ("absent.safetensors", "missing")),
        ({"a1": "2.safetensors"}, ("1.safetensors", "a1", "elsewhere")),
        ({"a1": ""}, ("1.safetensors", "a1", "elsewhere")),
        ({"new": "2.safetensors"}, ("2.safetensors", "new", "lacks")),
        ({"a1": "../1.safetensors"}, ("a1", "../1.safetensors")),
        ({"a1": 7}, ("a1", "7")),
    ],
)
def test_an_index_that_lies_is_refused(
    sharded: Path, changes: dict[str, Any], named: tuple[str, ...]
) -> None:
    _change_index(sharded, **changes)
    check_refusal(lambda: read_manifest(sharded), *named)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"weight_map": 3}', b"\xff", b"[" * 100_000]
)
def test_an_index_that_is_no_index_is_refused(sharded: Path, content: bytes) -> None:
    (sharded / INDEX_NAME).write_bytes(content)
    check_refusal(lambda: read_manifest(sharded), str(sharded / INDEX_NAME))


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    path = sharded / "2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    check_refusal(lambda: read_manifest(sharded), str(path), "truncated")


# ---- the tensors that config.json asks for ---------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("tiny-llama-gqa", tmp_path_factory.mktemp("tiny"))


def _check_changed(tiny: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Checks the tiny checkpoint after `change` was made to its tensors."""
    tensors = dict(read_manifest(tiny).tensors)
    change(tensors)
    check_tensors(read_model_config(tiny), Manifest(tensors))


def test_exactly_the_right_tensors_are_accepted(tiny: Path) -> None:
    _check_changed(tiny, lambda tensors: None)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_a_missing_tensor_is_named(tiny: Path, name: str) -> None:
    check_refusal(lambda: _check_changed(tiny, lambda t: t.pop(name)), "lack", name)


def test_a_wrong_shape_is_named(tiny: Path) -> None:
    name = "model.layers.0.self_attn.v_proj.weight"

    def transpose(tensors: dict[str, Any]) -> None:
        tensors[name] = replace(tensors[name], shape=(64, 32))

    check_refusal(lambda: _check_changed(tiny, transpose), name, "[64, 32]", "[32, 64]")


def test_a_dtype_that_no_layer_reads_is_named(tiny: Path) -> None:
    def quantize(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"] = replace(tensors["model.norm.weight"], dtype="I8")

    check_refusal(lambda: _check_changed(tiny, quantize), "model.norm.weight", "I8")


@pytest.mark.parametrize(
    "name", ["model.layers.2.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias"]
)
def test_a_tensor_that_would_stay_unused_is_named(tiny: Path, name: str) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors["model.norm.weight"]

    check_refusal(lambda: _check_changed(tiny, add), name, "unused")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_what_follows_from_the_rest_may_be_stored_too(tiny: Path, name: str) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors["model.norm.weight"]

    _check_changed(tiny, add)
