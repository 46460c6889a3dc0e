"""Accuracy figures: those of transformers, of a model against itself, of one that was rounded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pilotlight.bench import accuracy
from pilotlight.engine.errors import CheckpointError, ConfigError
from pilotlight.quantize import command
from pilotlight.server.config import DEMO_MODEL
from tokenizers import Tokenizer

TEXT = "def area(radius):\n    return 3.14159 * radius ** 2\n\nclass Circle:\n    pass\n" * 4


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text(TEXT)
    return path


def figures(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert accuracy.main([*map(str, words)]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_perplexity_is_that_of_transformers(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    found = figures(capsys, "--text", text, "--dtype", "float32", "--length", "512")
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    ids = torch.tensor([[0, *tokenizer.encode(TEXT, add_special_tokens=False).ids]])
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    with torch.inference_mode():
        mean_nats = model(ids, labels=ids).loss
    assert found["num_tokens"] == ids.shape[1] - 1
    assert found["perplexity"] == pytest.approx(mean_nats.exp().item(), rel=1e-4)
    per_byte = mean_nats.item() / torch.tensor(2.0).log().item() * found["num_tokens"] / len(TEXT)
    assert found["bits_per_byte"] == pytest.approx(per_byte, rel=1e-4)


def test_a_model_is_just_like_itself(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "--text", text, "--against", DEMO_MODEL)
    assert (found["top1_agreement"], found["loss_percent"]) == (1.0, 0.0)
    assert found["kl_nats"] == pytest.approx(0.0, abs=1e-6)


def test_a_rounded_model_is_less_like_it_the_fewer_bits_it_has(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distances = []
    for bits in ("8", "4"):
        out = tmp_path / bits
        command.main([str(DEMO_MODEL), str(out), "--bits", bits])
        found = figures(capsys, out, "--text", text, "--against", DEMO_MODEL)
        assert found["quantisation"].startswith(f"gptq int{bits}")
        distances.append((found["kl_nats"], 1 - found["top1_agreement"]))
    assert 0 < distances[0][0] < distances[1][0]
    assert distances[0][1] <= distances[1][1]


def test_it_ends_after_so_many_tokens(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = figures(capsys, "--text", text, "--length", "10")
    part = figures(capsys, "--text", text, "--length", "10", "--max-tokens", "25")
    assert part["num_tokens"] == 30 < whole["num_tokens"]


def test_other_tokens_cannot_be_compared(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(DEMO_MODEL, other)
    with (other / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ConfigError, match="share a tokenizer"):
        accuracy.main(["--text", str(text), "--against", str(other)])
    (other / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        accuracy.main([str(other), "--text", str(text)])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--length", "0"), "--length is 0"),
        (("--length", "4096"), "takes 1 to 2048"),
        (("--text", "/nowhere/at/all"), "--text /nowhere/at/all: No such file"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        accuracy.main([*words])
