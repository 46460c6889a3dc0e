"""`pilotlight quantize` on the built-in model: what it writes is what others would read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pilotlight.bench.make_model import write_model
from pilotlight.engine.errors import CheckpointError, ConfigError, UnsupportedModel
from pilotlight.engine.models.quantization import Scheme
from pilotlight.quantize.checkpoint import tensors_of
from pilotlight.quantize.command import main
from pilotlight.quantize.rounding import round_to_nearest
from pilotlight.server.config import DEMO_MODEL
from pilotlight.tests.models.checkpoints import engine_tokens, fp32_engine, prompt_of
from pilotlight.tests.models.quantized_checkpoints import words
from safetensors.torch import load_file

PROMPTS = [prompt_of(20, seed=1)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_v1", [True, False])
def test_tensors_are_those_of_the_format(bits: int, is_v1: bool) -> None:
    scheme = Scheme(bits, 32, False, False, is_v1)
    found = round_to_nearest(torch.randn(16, 64), scheme)
    written = tensors_of("m", found, scheme)
    assert torch.equal(written["m.qweight"], words(found.q.T.long(), bits, along=0))
    stored = (found.zeros.T.long() - is_v1 * 1) & (2**bits - 1)
    assert torch.equal(written["m.qzeros"], words(stored, bits, along=1))
    assert torch.equal(written["m.scales"].float(), found.scales.T)


@pytest.mark.parametrize(
    "flags",
    [
        ("--bits", "8"),
        ("--bits", "4", "--group", "64", "--asym", "--format", "gptq_v2"),
        ("--bits", "4", "--group", "32", "--desc-act", "--calibrate"),
        ("--bits", "8", "--group", "-1", "--calibrate"),
    ],
    ids=" ".join,
)
def test_what_is_written_is_served(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("def read(path):\n    return open(path).read()\n" * 40)
    more = (str(text), "--num-samples", "4", "--sample-len", "64") if "--calibrate" in flags else ()
    assert main([str(DEMO_MODEL), str(out), *flags, *more]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["method"] == ("gptq" if more else "rtn")
    assert (out / "tokenizer.json").is_file()
    tokens = engine_tokens(fp32_engine(out), PROMPTS, 8)
    assert len(tokens[0]) == 8
    described = json.loads((out / "config.json").read_text())["quantization_config"]
    assert described == json.loads((out / "quantize_config.json").read_text())
    if flags == ("--bits", "8"):
        assert tokens == engine_tokens(fp32_engine(DEMO_MODEL), PROMPTS, 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.txt"]


def test_mistakes_are_told_before_anything_is_written(tmp_path: Path) -> None:
    tiny = write_model("tiny-llama", tmp_path / "m", dtype="float32")
    out = tmp_path / "out"
    for words_, message in (
        ((str(tmp_path / "no"), str(out)), "not a folder"),
        ((str(tiny), str(tiny)), "there already"),
        ((str(tiny), str(out), "--group", "12"), "--group is 12"),
        ((str(tiny), str(out), "--desc-act"), "--desc-act needs"),
        ((str(tiny), str(out), "--calibrate", str(tmp_path / "none.txt")), "none.txt"),
        ((str(tiny), str(tmp_path / "a" / "b")), "is not a folder"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=message):
            main(list(words_))
        assert not out.exists()


def test_a_quantised_model_is_not_quantised_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(DEMO_MODEL), str(out), "--group", "32"]) == 0
    assert (
        load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.scales"].dtype
        is torch.float16
    )
    with pytest.raises(UnsupportedModel, match="already"):
        main([str(out), str(tmp_path / "again")])
