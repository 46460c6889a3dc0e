"""GPTQ checkpoints of every kind: the integers that the files hold, and the tokens that follow."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from pilotlight.bench.make_model import write_model
from pilotlight.engine.boot import boot
from pilotlight.engine.boot_report import Unheard
from pilotlight.engine.config import EngineConfig
from pilotlight.engine.errors import CheckpointError, SetupError, UnsupportedModel
from pilotlight.engine.models import artefact, gptq
from pilotlight.engine.models.quantization import Scheme
from pilotlight.kernels.quantized import unpack_groups, unpack_words
from pilotlight.tests.models.checkpoints import engine_tokens, fp32_engine, prompt_of
from pilotlight.tests.models.quantized_checkpoints import (
    Kind,
    edit_config,
    edit_tensors,
    quantize,
    words,
    write,
)
from pilotlight.weights_cache.store import Store
from safetensors.torch import load_file

LAYER = "model/layers/0/"
GRID = [
    Kind(*values)
    for values in itertools.product((4, 8), (-1, 32, 64, 128), (True, False), (True, False), (1, 2))
]


def _scheme(kind: Kind) -> Scheme:
    has_order = kind.desc_act and kind.group_size > 0
    return Scheme(kind.bits, max(kind.group_size, 0), kind.sym, has_order, kind.version == 1)


def _meant(module: dict[str, torch.Tensor], kind: Kind, num_outputs: int) -> torch.Tensor:
    """The weights [N, K] that the internal form stands for, in float64, inputs in their places."""
    scheme = _scheme(kind)
    order = gptq.common_order({"m": module["g_idx"]}, scheme)
    panels = gptq.words([module["qweight"]], order, scheme)
    num_inputs = len(module["g_idx"])
    q = unpack_words(panels, kind.bits, num_outputs, num_inputs).double()
    groups = torch.arange(num_inputs) // scheme.group_len(num_inputs)
    scales = unpack_groups(gptq.scales([module["scales"]]), num_outputs).double()[:, groups]
    z = torch.full_like(scales, 2 ** (kind.bits - 1))
    if not kind.sym:
        z = unpack_groups(gptq.zeros([module["qzeros"]], scheme), num_outputs).double()[:, groups]
    weight = (q - z) * scales
    back = torch.empty_like(weight)
    back[:, torch.arange(num_inputs) if order is None else order.long()] = weight
    return back


@pytest.mark.parametrize("kind", GRID, ids=str)
def test_every_kind_means_exactly_what_the_formula_says(kind: Kind) -> None:
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(1))
    module, meant = quantize(weight, kind)
    if kind.sym:
        gptq.check_symmetric("m", module["qzeros"], _scheme(kind))
    assert torch.equal(_meant(module, kind, 40), meant)


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_value(scales: torch.dtype) -> None:
    kind = Kind(scales=scales)
    module, meant = quantize(torch.randn(16, 64), kind)
    assert torch.equal(_meant(module, kind, 16), meant)


def test_golden_words() -> None:
    """q = 0..7 along the inputs, lowest first; a true zero of 0 is stored as all ones in v1."""
    assert words(torch.arange(8)[:, None], 4, along=0).item() == 0x76543210
    scheme = Scheme(4, 0, False, False, adds_one=True)
    panels = gptq.words([torch.tensor([[0x76543210]], dtype=torch.int32)], None, scheme)
    assert unpack_words(panels, 4, 1, 8).tolist() == [list(range(8))]
    stored = torch.tensor([[0x7777777F]], dtype=torch.int32)
    assert unpack_groups(gptq.zeros([stored], scheme), 8)[:, 0].tolist() == [0, *[8] * 7]
    eight = Scheme(8, 0, True, False, adds_one=True)
    gptq.check_symmetric("m", torch.full((2, 2), 0x7F7F7F7F, dtype=torch.int32), eight)


# ---- whole checkpoints -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("tiny-qwen2", tmp_path_factory.mktemp("model") / "m", dtype="float32")


PROMPTS = [prompt_of(length, seed=length) for length in (1, 9, 30)]
WHOLE = [
    Kind(4, 32, True, False, 1),
    Kind(4, 32, False, True, 2),
    Kind(8, -1, True, False, 1),
    Kind(8, 64, False, False, 1, torch.bfloat16),
]


@pytest.mark.parametrize("kind", WHOLE, ids=str)
def test_tokens_are_those_of_the_floats_that_are_meant(
    kind: Kind, source: Path, tmp_path: Path
) -> None:
    folder = write(source, tmp_path / "q", kind)
    wanted = engine_tokens(fp32_engine(tmp_path / "q-float"), PROMPTS, 16)
    assert engine_tokens(fp32_engine(folder), PROMPTS, 16) == wanted


def test_modules_that_are_not_quantised_are_floats(source: Path, tmp_path: Path) -> None:
    folder = write(source, tmp_path / "q", Kind(), skipped=("down_proj", "layers.1."))
    wanted = engine_tokens(fp32_engine(tmp_path / "q-float"), PROMPTS, 16)
    assert engine_tokens(fp32_engine(folder), PROMPTS, 16) == wanted


def test_the_configuration_may_be_a_file_of_its_own(source: Path, tmp_path: Path) -> None:
    folder = write(source, tmp_path / "q", Kind())
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config=None)
    (folder / "quantize_config.json").write_text(json.dumps(described))
    assert engine_tokens(fp32_engine(folder), PROMPTS[:1], 2)


def test_extra_biases_of_zeros_are_passed_over(source: Path, tmp_path: Path) -> None:
    folder = write(source, tmp_path / "q", Kind())
    name = f"{LAYER}mlp/down_proj/bias"
    rows = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.scales"].shape[1]
    edit_tensors(folder, **{name: torch.zeros(rows, dtype=torch.float16)})
    assert engine_tokens(fp32_engine(folder), PROMPTS[:1], 2)
    edit_tensors(folder, **{name: torch.ones(rows, dtype=torch.float16)})
    with pytest.raises(CheckpointError, match="bias is not zero"):
        fp32_engine(folder)


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"bits": 3}, UnsupportedModel, "bits is 3"),
        ({"group_size": 0}, CheckpointError, "group_size is 0"),
        ({"group_size": 12}, UnsupportedModel, "group_size is 12"),
        ({"checkpoint_format": "marlin"}, UnsupportedModel, "'marlin'"),
        ({"quant_method": "aqlm"}, UnsupportedModel, "'aqlm'"),
        ({"sym": "yes"}, CheckpointError, "sym is 'yes'"),
        ({"checkpoint_format": "gptq_v2"}, CheckpointError, "are those of format gptq"),
        ({"bits": 8}, CheckpointError, "shape"),
        ({"group_size": 64}, CheckpointError, "shape"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    changes: dict[str, object], error: type[SetupError], words: str, source: Path, tmp_path: Path
) -> None:
    folder = write(source, tmp_path / "q", Kind())
    edit_config(folder, quantization_config=Kind().config() | changes)
    with pytest.raises(error, match=words):
        fp32_engine(folder)


def test_tensors_that_do_not_fit_are_refused(source: Path, tmp_path: Path) -> None:
    folder = write(source, tmp_path / "q", Kind())
    name = "model.layers.0.self_attn.q_proj.qweight"
    good = load_file(folder / "model.safetensors")[name]
    edited = name.replace(".", "/")
    for value, message in (
        (None, "lack|g_idx|unused"),
        (good[:-1].contiguous(), "shape"),
        (good.float(), "dtype F32; I32"),
    ):
        edit_tensors(folder, **{edited: value})
        with pytest.raises(SetupError, match=message):
            fp32_engine(folder)
    edit_tensors(folder, **{edited: good})
    edit_config(folder, quantization_config=None)
    with pytest.raises(CheckpointError, match="says how it is quantised"):
        fp32_engine(folder)


def test_zero_points_of_a_symmetric_file_must_be_the_middle(source: Path, tmp_path: Path) -> None:
    folder = write(source, tmp_path / "q", Kind(sym=False))
    edit_config(folder, quantization_config=Kind(sym=True).config())
    with pytest.raises(CheckpointError, match="sym should be false"):
        fp32_engine(folder)


def test_an_order_is_refused_where_none_is_expected_or_where_orders_differ() -> None:
    scheme = Scheme(4, 2, True, True, True)
    a, b = torch.tensor([0, 1, 0, 1]), torch.tensor([1, 1, 0, 0])
    assert gptq.common_order({"q": a, "k": a}, scheme).tolist() == [0, 2, 1, 3]
    with pytest.raises(UnsupportedModel, match="q and k order"):
        gptq.common_order({"q": a, "k": b}, scheme)
    with pytest.raises(CheckpointError, match="2 inputs into each group"):
        gptq.order_of("q", torch.tensor([0, 0, 0, 1]), scheme)
    with pytest.raises(CheckpointError, match="desc_act is false"):
        gptq.order_of("q", a, Scheme(4, 2, True, False, True))


@pytest.mark.parametrize("skipped", ["k_proj", "up_proj"])
@pytest.mark.parametrize("kind", WHOLE[:2], ids=str)
def test_parts_that_are_quantised_in_part_are_computed_each_for_itself(
    kind: Kind, skipped: str, source: Path, tmp_path: Path
) -> None:
    folder = write(source, tmp_path / "q", kind, skipped=(skipped,))
    wanted = engine_tokens(fp32_engine(tmp_path / "q-float"), PROMPTS, 16)
    assert engine_tokens(fp32_engine(folder), PROMPTS, 16) == wanted


def test_parts_may_have_other_bits_by_a_dynamic_rule(source: Path, tmp_path: Path) -> None:
    folder = write(source, tmp_path / "q", Kind())
    eight = write(source, tmp_path / "eight", Kind(bits=8))
    name = "model.layers.1.self_attn.v_proj"
    for target, other in ((folder, eight), (tmp_path / "q-float", tmp_path / "eight-float")):
        tensors = load_file(other / "model.safetensors")
        found = {n.replace(".", "/"): t for n, t in tensors.items() if n.startswith(f"{name}.")}
        edit_tensors(target, **found)
    described = Kind().config() | {"dynamic": {r"+:.*layers\.1\..*v_proj": {"bits": 8}}}
    edit_config(folder, quantization_config=described)
    wanted = engine_tokens(fp32_engine(tmp_path / "q-float"), PROMPTS, 16)
    assert engine_tokens(fp32_engine(folder), PROMPTS, 16) == wanted


@pytest.mark.parametrize("kind", [WHOLE[0], WHOLE[1]], ids=str)
def test_an_artefact_is_mapped_and_nothing_is_packed_again(
    kind: Kind, source: Path, tmp_path: Path
) -> None:
    folder = write(source, tmp_path / "q", kind)
    wanted = engine_tokens(fp32_engine(folder), PROMPTS, 12)
    cache = tmp_path / "cache"
    artefact.build(Store(cache), folder, "cpu", "float32")
    for record in (cache / "digests").iterdir():  # as if hashed long after the files were written
        os.utime(record, (record.stat().st_mtime + 10,) * 2)
    config = EngineConfig(
        model=str(folder), device="cpu", dtype="float32", kv_cache_bytes=8 << 20, max_num_seqs=4,
        max_batched_tokens=16, max_model_len=200, num_threads=1, cache=str(cache),
    )  # fmt: skip
    booted = boot(config, Unheard(), lambda: None)
    assert (booted.facts.artefact, booted.facts.weights.copied_bytes) == ("artefact", 0)
    assert booted.facts.quantisation.startswith("gptq int4, group 32")
    assert engine_tokens(booted.core, PROMPTS, 12) == wanted
    booted.close()
