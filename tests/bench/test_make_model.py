"""Random-weight checkpoints: the shapes that benches name, shards with their index, same seeds."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pilotlight.bench import make_model
from pilotlight.bench.make_model import SHAPES, config_of, tensor_shapes, write_model
from pilotlight.engine.models.config import ModelConfig, read_model_config
from pilotlight.engine.models.names import check_tensors, expected_tensors
from pilotlight.weights_cache.manifest import INDEX_NAME, SINGLE_NAME, read_manifest
from safetensors.torch import load_file
from tokenizers import Tokenizer

TINY = [name for name in SHAPES if name.startswith("tiny-")]
FAMILIES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
SHARD_BYTES = 100_000


def config_in(folder: Path, shape_name: str) -> ModelConfig:
    """As the engine reads it; no weights are written."""
    (folder / "config.json").write_text(json.dumps(config_of(SHAPES[shape_name], "bfloat16")))
    return read_model_config(folder)


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    return write_model("tiny-qwen2-untied", folder, max_shard_bytes=SHARD_BYTES)


# ---- shapes ----------------------------------------------------------------------------------

DIMENSIONS: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": {
        "architecture": "Qwen2ForCausalLM", "vocab_size": 32_000, "hidden_size": 896,
        "intermediate_size": 4864, "num_layers": 24, "num_heads": 14, "num_kv_heads": 2,
        "head_dim": 64, "is_tied": True, "has_qkv_bias": True,
    },
    "llama-3.2-1b": {
        "architecture": "LlamaForCausalLM", "vocab_size": 128_256, "hidden_size": 2048,
        "intermediate_size": 8192, "num_layers": 16, "num_heads": 32, "num_kv_heads": 8,
        "head_dim": 64, "is_tied": True, "has_qkv_bias": False, "rope_theta": 500_000.0,
    },
    "llama-3.1-8b": {
        "architecture": "LlamaForCausalLM", "vocab_size": 128_256, "hidden_size": 4096,
        "intermediate_size": 14_336, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8,
        "head_dim": 128, "is_tied": False, "has_qkv_bias": False, "rope_theta": 500_000.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DIMENSIONS)
def test_a_real_shape_has_the_dimensions_of_its_model(tmp_path: Path, name: str) -> None:
    config = config_in(tmp_path, name)
    assert {key: getattr(config, key) for key in DIMENSIONS[name]} == DIMENSIONS[name]


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("llama-3.2-1b", 1_235_814_400), ("llama-3.1-8b", 8_030_261_248)],
)
def test_a_real_shape_has_the_published_number_of_parameters(
    name: str, num_parameters: int
) -> None:
    assert sum(math.prod(size) for size in tensor_shapes(SHAPES[name]).values()) == num_parameters


@pytest.mark.parametrize(("name", "factor"), [("llama-3.2-1b", 32.0), ("llama-3.1-8b", 8.0)])
def test_llama_3_scales_its_rope(name: str, factor: float) -> None:
    scaling = config_of(SHAPES[name], "bfloat16")["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", factor)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_the_tensors_that_its_config_asks_for(tmp_path: Path, name: str) -> None:
    assert tensor_shapes(SHAPES[name]) == expected_tensors(config_in(tmp_path, name))


def test_every_family_has_a_tiny_shape() -> None:
    assert {SHAPES[name].architecture for name in TINY} == FAMILIES


# ---- what is written -------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_is_a_whole_checkpoint(tmp_path: Path, name: str) -> None:
    folder = write_model(name, tmp_path / "new" / name)
    config = read_model_config(folder)
    check_tensors(config, read_manifest(folder))
    tensors = load(folder)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors.values())
    assert config.eos_token_ids == (0,)


def test_the_tokenizer_stays_inside_the_vocabulary(tmp_path: Path) -> None:
    """One token per byte where the demo model's does not fit; it reads back what it wrote."""
    tokenizer = Tokenizer.from_file(str(write_model("tiny-llama", tmp_path) / "tokenizer.json"))
    text = "naïve\tcode → 𝛑\n"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    assert max(ids) < SHAPES["tiny-llama"].vocab_size
    assert tokenizer.decode(ids) == text


def test_a_larger_vocabulary_gets_the_demo_tokenizer(tmp_path: Path) -> None:
    folder = write_model("tiny-llama", tmp_path, vocab_size=5000)
    assert read_model_config(folder).vocab_size == 5000
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert 512 < tokenizer.get_vocab_size() <= 5000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_can_be_chosen(tmp_path: Path, dtype: str) -> None:
    tensors = load(write_model("tiny-llama", tmp_path, dtype=dtype))
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert read_model_config(tmp_path).checkpoint_dtype == dtype


def test_a_seed_makes_one_model(tmp_path: Path) -> None:
    one, same, other = (
        load(write_model("tiny-llama-gqa", tmp_path / str(i), seed=seed))
        for i, seed in enumerate((1, 1, 2))
    )
    assert is_equal(one, same)
    assert not is_equal(one, other)


# ---- shards ----------------------------------------------------------------------------------


def test_the_index_names_the_shard_of_every_tensor(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_NAME).read_text())
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load(sharded).values())


def test_a_shard_stays_below_its_limit_unless_it_is_one_tensor(sharded: Path) -> None:
    shards = [load_file(file) for file in sharded.glob("*.safetensors")]
    sizes = [(len(shard), sum(t.nbytes for t in shard.values())) for shard in shards]
    assert all(count == 1 or num_bytes <= SHARD_BYTES for count, num_bytes in sizes)
    assert any(count > 1 for count, _ in sizes)


def test_shards_hold_what_one_file_would(sharded: Path, tmp_path: Path) -> None:
    single = write_model("tiny-qwen2-untied", tmp_path)
    assert [file.name for file in single.glob("*.safetensors")] == [SINGLE_NAME]
    assert not (single / INDEX_NAME).exists()
    assert is_equal(load(sharded), load(single))


def test_the_engine_reads_all_shards(sharded: Path) -> None:
    check_tensors(read_model_config(sharded), read_manifest(sharded))


# ---- the command -----------------------------------------------------------------------------


def test_the_command_ends_with_a_json_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["make_model.py", "--shape", "tiny-llama", str(tmp_path / "out"), "--dtype", "float16"]
    monkeypatch.setattr(sys, "argv", words)
    assert make_model.main() == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["shape"], result["path"]) == ("tiny-llama", str(tmp_path / "out"))
    assert result["weight_bytes"] == (tmp_path / "out" / SINGLE_NAME).stat().st_size


def test_an_unknown_shape_is_refused_with_the_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_model.py", "--shape", "gpt-5", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        make_model.main()
    assert caught.value.code == 2
    assert "unknown shape 'gpt-5'; choose from: qwen2-0.5b" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
