"""Every tiny shape against transformers in fp32: greedy tokens through the engine, and logits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pilotlight.bench.make_model import write_model
from pilotlight.engine.config import EngineConfig
from pilotlight.engine.models.config import ModelConfig, read_model_config
from pilotlight.engine.models.decoder import AttentionBatch, Decoder, LayerCache
from pilotlight.engine.models.weights import Preparer, assemble
from pilotlight.engine.target import choose_target
from pilotlight.kernels.table import bind
from pilotlight.tests.models.checkpoints import (
    TINY_SHAPES,
    engine_tokens,
    fp32_engine,
    prompt_of,
    reference_logits,
    reference_model,
    reference_tokens,
)
from pilotlight.weights_cache.manifest import read_manifest
from pilotlight.weights_cache.stream.mapped import MappedWeights
from torch import Tensor
from transformers import PreTrainedModel

PROMPT_LENS = (1, 15, 16, 41, 97)
"""One token, both sides of a block and of a step's budget, several chunks."""
NUM_NEW_TOKENS = 64
BLOCK_SIZE = 4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Checkpoint:
    shape: str
    folder: Path
    reference: PreTrainedModel


@pytest.fixture(scope="session", params=TINY_SHAPES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    folder = write_model(request.param, tmp_path_factory.mktemp(request.param))
    return Checkpoint(request.param, folder, reference_model(folder))


def test_greedy_tokens_of_a_mixed_batch_are_those_of_transformers(checkpoint: Checkpoint) -> None:
    prompts = [prompt_of(length, seed=length) for length in PROMPT_LENS]
    expected = [reference_tokens(checkpoint.reference, p, NUM_NEW_TOKENS) for p in prompts]
    assert all(len(tokens) == NUM_NEW_TOKENS for tokens in expected)
    assert engine_tokens(fp32_engine(checkpoint.folder), prompts, NUM_NEW_TOKENS) == expected


@pytest.mark.parametrize("chunk_lens", [(75,), (30, 1, 44)], ids=["whole", "in chunks"])
def test_logits_of_a_long_prompt_are_those_of_transformers(
    checkpoint: Checkpoint, chunk_lens: tuple[int, ...]
) -> None:
    token_ids = prompt_of(sum(chunk_lens), seed=7)
    logits = _logits(checkpoint.folder, token_ids, chunk_lens)
    expected = reference_logits(checkpoint.reference, token_ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_windows_of_some_layers_only_are_those_of_transformers(tmp_path: Path) -> None:
    folder = write_model("tiny-qwen2", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    token_ids = prompt_of(40, seed=8)
    expected = reference_logits(reference_model(folder), token_ids)
    torch.testing.assert_close(_logits(folder, token_ids, (17, 23)), expected, rtol=0, atol=1e-4)


def test_the_long_prompt_is_longer_than_the_window(checkpoint: Checkpoint) -> None:
    """Else nothing above would notice a window that is ignored."""
    windows = read_model_config(checkpoint.folder).sliding_windows
    assert set(windows) == ({16} if checkpoint.shape == "tiny-mistral" else {0})


@torch.inference_mode()
def _logits(folder: Path, token_ids: list[int], chunk_lens: tuple[int, ...]) -> Tensor:
    """Of every position, through a cache whose blocks lie in reverse order."""
    config = read_model_config(folder)
    source = MappedWeights(read_manifest(folder))
    layout = choose_target(EngineConfig(model=str(folder), dtype="float32"), "float32").layout
    weights = assemble(config, layout, Preparer(source, CPU, torch.float32))
    decoder = Decoder(config, weights, bind(CPU, torch.float32), len(token_ids), lambda: None)
    num_blocks = -(-len(token_ids) // BLOCK_SIZE)
    caches = _caches(config, num_blocks)
    hidden, start = [], 0
    for chunk_len in chunk_lens:
        batch = _batch(start, chunk_len, num_blocks)
        chunk = torch.tensor(token_ids[start : start + chunk_len], dtype=torch.int32)
        hidden.append(decoder.forward(chunk, batch, caches))
        start += chunk_len
    return decoder.logits(torch.cat(hidden))


def _caches(config: ModelConfig, num_blocks: int) -> list[LayerCache]:
    shape = (num_blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    return [LayerCache(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_layers)]


def _batch(start: int, num_tokens: int, num_blocks: int) -> AttentionBatch:
    positions = torch.arange(start, start + num_tokens, dtype=torch.int32)
    table = torch.arange(num_blocks - 1, -1, -1, dtype=torch.int32)
    return AttentionBatch(
        positions=positions,
        slot_mapping=table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
        block_tables=table[None],
        query_start=torch.tensor([0, num_tokens], dtype=torch.int32),
        context_lens=torch.tensor([start + num_tokens], dtype=torch.int32),
    )
