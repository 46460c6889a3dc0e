"""Checkpoints, engines and reference outputs that the tests of models and worker share.

The reference is transformers in fp32. Everything here is deterministic, and runs on one thread:
threads that wait for each other over such small matrices cost minutes on a busy machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pilotlight.bench.make_model import SHAPES
from pilotlight.engine.boot import boot
from pilotlight.engine.boot_report import Unheard
from pilotlight.engine.config import EngineConfig
from pilotlight.engine.core import EngineCore
from pilotlight.engine.messages import Output, Submit
from pilotlight.engine.sampling_params import SamplingParams
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

TINY_SHAPES = [name for name in SHAPES if name.startswith("tiny-")]


def fp32_engine(folder: Path, **overrides: int | str) -> EngineCore:
    return cpu_engine(folder, dtype="float32", **overrides)


def cpu_engine(folder: Path, **overrides: int | str) -> EngineCore:
    """The real engine on the CPU, with steps so small that prompts come in chunks."""
    settings: dict[str, Any] = {
        "kv_cache_bytes": 8 << 20,
        "max_num_seqs": 4,
        "max_batched_tokens": 16,
        "max_model_len": 200,
        "num_threads": 1,
        # Chunks of prompts are then of the same tokens at any speed.
        "max_decode_slowdown": 0.0,
    }
    config = EngineConfig(model=str(folder), device="cpu", **(settings | overrides))
    return boot(config, Unheard(), lambda: None).core


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


def run_until_idle(core: EngineCore) -> list[Output]:
    outputs: list[Output] = []
    while core.has_work:
        record = core.step()
        outputs += record.outputs if record else []
    return outputs


def engine_tokens(
    core: EngineCore, prompts: Sequence[list[int]], num_tokens: int
) -> list[list[int]]:
    """Greedy continuations of all prompts, submitted at once."""
    for i, prompt in enumerate(prompts):
        core.submit(Submit(str(i), prompt, greedy(num_tokens)))
    generated: list[list[int]] = [[] for _ in prompts]
    for output in run_until_idle(core):
        generated[int(output.request_id)] += output.token_ids
    return generated


def reference_model(folder: Path) -> PreTrainedModel:
    """transformers' own implementation, never ending at an end token."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def reference_tokens(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
    )
    return whole[0, len(prompt) :].tolist()


def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """[T, vocab_size] of one sequence."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0]


def prompt_of(length: int, seed: int, vocab_size: int = 512) -> list[int]:
    """Any token but 0, the end token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab_size, (length,), generator=generator).tolist()
