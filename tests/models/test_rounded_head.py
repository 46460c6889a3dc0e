"""A head that is rounded to int8 as weights are packed: its values, its artefact, its tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pilotlight.bench.make_model import write_model
from pilotlight.engine.boot import boot
from pilotlight.engine.boot_report import Unheard
from pilotlight.engine.config import EngineConfig
from pilotlight.engine.found_weights import find_weights
from pilotlight.engine.models import artefact
from pilotlight.engine.models.rounded_head import rounded
from pilotlight.kernels.quantized import unpack_groups, unpack_words
from pilotlight.tests.models.checkpoints import engine_tokens, fp32_engine, prompt_of
from pilotlight.weights_cache.store import Store
from safetensors.torch import load_file, save_file

PROMPTS = [prompt_of(length, seed=length) for length in (1, 9, 30)]


@pytest.mark.parametrize("num_inputs", [64, 128, 320])
def test_no_weight_moves_by_more_than_half_a_step(num_inputs: int) -> None:
    weight = torch.randn(40, num_inputs, generator=torch.Generator().manual_seed(1))
    weight[3], weight[5, 7] = 0.0, 50.0
    q = unpack_words(rounded("words", weight), 8, 40, num_inputs)
    groups = torch.arange(num_inputs) // min(128, num_inputs)
    scales = unpack_groups(rounded("scales", weight), 40)[:, groups]
    error = ((q - 128) * scales - weight).abs()
    assert bool((error <= scales / 2 * 1.001).all())
    assert bool((q[3] == 128).all())


@pytest.fixture(scope="module", params=["tiny-qwen2", "tiny-llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a tied head, one with its own."""
    return write_model(request.param, tmp_path_factory.mktemp("model") / "m", dtype="float32")


def test_tokens_are_those_of_the_rounded_matrix(folder: Path, tmp_path: Path) -> None:
    """Where the head is its own, the same values as floats: the embedding stays as it is."""
    tensors = load_file(folder / "model.safetensors")
    if "lm_head.weight" not in tensors:
        pytest.skip("a tied head cannot be given other values than the embedding")
    weight = tensors["lm_head.weight"]
    num_outputs, num_inputs = weight.shape
    q = unpack_words(rounded("words", weight), 8, num_outputs, num_inputs)
    groups = torch.arange(num_inputs) // min(128, num_inputs)
    scales = unpack_groups(rounded("scales", weight), num_outputs)[:, groups]
    meant = tmp_path / "meant"
    meant.mkdir()
    (meant / "config.json").write_text((folder / "config.json").read_text())
    tensors["lm_head.weight"] = ((q - 128) * scales).contiguous()
    save_file(tensors, meant / "model.safetensors")
    wanted = engine_tokens(fp32_engine(meant), PROMPTS, 16)
    assert engine_tokens(fp32_engine(folder, head_dtype="int8"), PROMPTS, 16) == wanted


def test_its_artefact_is_another_one_and_is_mapped(folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    plain = artefact.build(store, folder, "cpu", "float32")
    built = artefact.build(store, folder, "cpu", "float32", "int8")
    assert built.key != plain.key
    asked = EngineConfig(
        model=str(folder), device="cpu", dtype="float32", head_dtype="int8", cache=str(tmp_path),
        kv_cache_bytes=8 << 20, max_num_seqs=4, max_batched_tokens=16, max_model_len=200,
        num_threads=1,
    )  # fmt: skip
    assert find_weights(asked, folder).model.rounds_head
    wanted = engine_tokens(fp32_engine(folder, head_dtype="int8"), PROMPTS, 12)
    booted = boot(asked, Unheard(), lambda: None)
    assert engine_tokens(booted.core, PROMPTS, 12) == wanted
    booted.close()
