"""Mapped tensors equal those that the safetensors library loads."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from pilotlight.bench.make_model import write_model
from pilotlight.weights_cache.manifest import INDEX_NAME, SINGLE_NAME, read_manifest
from pilotlight.weights_cache.stream.mapped import TORCH_DTYPES, MappedWeights
from safetensors.torch import load_file, save_file


def _load_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def _assert_equal(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    manifest = read_manifest(folder)
    source = MappedWeights(manifest)
    assert manifest.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        mapped = source.tensor(name)
        assert (mapped.dtype, mapped.shape) == (tensor.dtype, tensor.shape)
        assert _bytes(mapped).equal(_bytes(tensor)), name
    assert manifest.num_bytes == sum(tensor.nbytes for tensor in expected.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_single_file(tmp_path: Path, dtype: str) -> None:
    folder = write_model("tiny-qwen2-untied", tmp_path, dtype=dtype)
    assert (folder / SINGLE_NAME).is_file()
    _assert_equal(folder, _load_all(folder))


def test_shards(tmp_path: Path) -> None:
    folder = write_model("tiny-llama", tmp_path, max_shard_bytes=100_000)
    assert (folder / INDEX_NAME).is_file()
    assert len(list(folder.glob("*.safetensors"))) > 2
    _assert_equal(folder, _load_all(folder))


def test_every_dtype(tmp_path: Path) -> None:
    data = torch.randint(0, 2, (240,), generator=torch.Generator().manual_seed(0))
    tensors = {code: data.to(dtype) for code, dtype in TORCH_DTYPES.items()}
    save_file(tensors, tmp_path / SINGLE_NAME)
    _assert_equal(tmp_path, tensors)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 2, 3)])
def test_any_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {"x": torch.full(shape, 2.5), "y": torch.ones(3)}
    save_file(tensors, tmp_path / SINGLE_NAME)
    _assert_equal(tmp_path, tensors)


def test_a_tensor_at_an_odd_offset_is_aligned_in_memory(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = struct.pack("<B2f", 7, 1.5, -2.5)
    (tmp_path / SINGLE_NAME).write_bytes(struct.pack("<Q", len(text)) + text + data)
    tensor = MappedWeights(read_manifest(tmp_path)).tensor("b")
    assert tensor.tolist() == [1.5, -2.5]
    assert tensor.data_ptr() % 4 == 0


def test_tensors_are_views_of_one_mapping(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / SINGLE_NAME)
    source = MappedWeights(read_manifest(tmp_path))
    assert source.tensor("a").data_ptr() == source.tensor("a").data_ptr()
    assert source.tensor("b").data_ptr() - source.tensor("a").data_ptr() == 8
