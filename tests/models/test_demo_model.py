"""The built-in model in fp32: 50 pieces of Python, token for token as transformers continues them.

With a KV cache of int8 nearly so. The prompts are the first lines of functions and classes of the
standard library.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pilotlight
import pytest
from pilotlight.engine.core import EngineCore
from pilotlight.tests.models.checkpoints import (
    engine_tokens,
    fp32_engine,
    reference_logits,
    reference_model,
)
from tokenizers import Tokenizer
from transformers import PreTrainedModel

DEMO = Path(pilotlight.__file__).parent / "demo" / "model"
MODULES = ("argparse", "bisect", "calendar", "configparser", "csv", "fractions", "heapq", "shlex")
NUM_PROMPTS = 50
NUM_NEW_TOKENS = 32
LEAST_INT8_SHARE = 0.99
"""Of tokens that are the best ones of an exact cache too, behind the same text; 0.995 were."""

pytestmark = pytest.mark.skipif(
    not (DEMO / "model.safetensors").is_file(), reason="the built-in model is not trained yet"
)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """From one line to nine, so that lengths differ within a batch."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    pieces = [piece for module in MODULES for piece in _pieces(module)]
    chosen = pieces[:: len(pieces) // NUM_PROMPTS][:NUM_PROMPTS]
    cut = ["".join(piece[: 1 + i % 9]) for i, piece in enumerate(chosen)]
    return [tokenizer.encode(text).ids for text in cut]


def _pieces(module: str) -> Iterator[list[str]]:
    """The lines of each function and class of a module, in the order of the file."""
    text = Path(ast.__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield lines[node.lineno - 1 : node.end_lineno]


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return reference_model(DEMO)


def engine_with(kv_cache_dtype: str) -> EngineCore:
    return fp32_engine(
        DEMO,
        kv_cache_bytes=32 << 20,
        kv_cache_dtype=kv_cache_dtype,
        max_num_seqs=16,
        max_batched_tokens=64,
        max_model_len=512,
    )


def test_fifty_prompts_continue_as_with_transformers(
    prompts: list[list[int]], reference: PreTrainedModel
) -> None:
    assert len({tuple(prompt) for prompt in prompts}) == NUM_PROMPTS
    assert max(map(len, prompts)) > 64, "no prompt needs a second chunk"
    generated = engine_tokens(engine_with("auto"), prompts, NUM_NEW_TOKENS)
    for prompt, tokens in zip(prompts, generated, strict=True):
        assert tokens == _continued(reference, prompt, tokens)


def test_a_cache_of_int8_changes_few_tokens(
    prompts: list[list[int]], reference: PreTrainedModel
) -> None:
    generated = engine_tokens(engine_with("int8"), prompts, NUM_NEW_TOKENS)
    num_equal = 0
    for prompt, tokens in zip(prompts, generated, strict=True):
        best = _continued(reference, prompt, tokens)
        num_equal += sum(a == b for a, b in zip(tokens, best, strict=True))
    share = num_equal / (NUM_PROMPTS * NUM_NEW_TOKENS)
    assert share >= LEAST_INT8_SHARE


def _continued(reference: PreTrainedModel, prompt: list[int], tokens: list[int]) -> list[int]:
    """The best token behind the prompt and behind each of `tokens`.

    It equals `tokens` exactly when greedy decoding generates them, and takes one forward pass.
    """
    assert len(tokens) == NUM_NEW_TOKENS
    logits = reference_logits(reference, prompt + tokens)
    return logits[len(prompt) - 1 : -1].argmax(-1).tolist()
