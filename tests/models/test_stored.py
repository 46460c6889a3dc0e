"""AWQ's and compressed-tensors' checkpoints: the integers they hold, and the tokens that follow."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from pilotlight.bench.make_model import write_model
from pilotlight.engine.errors import CheckpointError, SetupError, UnsupportedModel
from pilotlight.engine.models import gptq
from pilotlight.engine.models.quantization import AWQ, PACKED, Scheme
from pilotlight.engine.models.quantization_config import read_quantization
from pilotlight.engine.models.stored import as_gptq
from pilotlight.kernels.quantized import unpack_groups, unpack_words
from pilotlight.tests.models.checkpoints import engine_tokens, fp32_engine, prompt_of
from pilotlight.tests.models.quantized_checkpoints import (
    Kind,
    awq_words,
    edit_config,
    edit_tensors,
    quantize,
    write,
)
from safetensors.torch import load_file

SIZES = (-1, 32, 64, 128)
AWQ_GRID = [Kind(4, group, sym=False, stored="awq") for group in SIZES]
PACKED_GRID = [
    Kind(bits, group, sym, order, stored="packed")
    for bits, group, sym, order in itertools.product((4, 8), SIZES, (True, False), (True, False))
    if group > 0 or not order
]
NAMES = {
    "awq": ("qweight", "qzeros", "scales", "g_idx"),
    "packed": ("weight_packed", "weight_zero_point", "weight_scale", "weight_g_idx"),
}


def _scheme(kind: Kind) -> Scheme:
    stored = {"awq": AWQ, "packed": PACKED}[kind.stored]
    return Scheme(kind.bits, max(kind.group_size, 0), kind.sym, kind.desc_act, False, stored)


def _meant(module: dict[str, torch.Tensor], kind: Kind, shape: torch.Size) -> torch.Tensor:
    """The weights [N, K] that the internal form stands for, in float64, inputs in their places."""
    scheme, (num_outputs, num_inputs) = _scheme(kind), shape
    parts = ("qweight", "qzeros", "scales", "g_idx")
    found = {
        part: as_gptq(part, module[name], scheme)
        for part, name in zip(parts, NAMES[kind.stored], strict=True)
        if name in module
    }
    order = gptq.order_of("m", found["g_idx"], scheme) if "g_idx" in found else None
    panels = gptq.words([found["qweight"]], order, scheme)
    q = unpack_words(panels, kind.bits, num_outputs, num_inputs).double()
    groups = torch.arange(num_inputs) // scheme.group_len(num_inputs)
    scales = unpack_groups(gptq.scales([found["scales"]]), num_outputs).double()[:, groups]
    z = torch.full_like(scales, 2 ** (kind.bits - 1))
    if not kind.sym:
        z = unpack_groups(gptq.zeros([found["qzeros"]], scheme), num_outputs).double()[:, groups]
    weight = (q - z) * scales
    back = torch.empty_like(weight)
    back[:, torch.arange(num_inputs) if order is None else order.long()] = weight
    return back


@pytest.mark.parametrize("kind", AWQ_GRID + PACKED_GRID, ids=str)
def test_every_kind_means_exactly_what_its_formula_says(kind: Kind) -> None:
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(1))
    module, meant = quantize(weight, kind)
    assert torch.equal(_meant(module, kind, weight.shape), meant)


def test_more_inputs_than_are_taken_apart_at_once() -> None:
    kind = Kind(4, 128, sym=False, stored="awq")
    weight = torch.randn(16, 1152, generator=torch.Generator().manual_seed(2))
    module, meant = quantize(weight, kind)
    assert torch.equal(_meant(module, kind, weight.shape), meant)


def test_golden_words_of_awq() -> None:
    """Outputs 0 to 7 lie in the order 0, 2, 4, 6, 1, 3, 5, 7, lowest bits first."""
    word = torch.tensor([[0x75316420]], dtype=torch.int32)
    assert torch.equal(awq_words(torch.arange(8)[None]), word)
    scheme = Scheme(4, 0, False, False, False, AWQ)
    assert as_gptq("qzeros", word, scheme).item() == 0x76543210
    found = as_gptq("qweight", word.repeat(8, 1), scheme)
    assert [w & 0xFFFFFFFF for w in found[0].tolist()] == [0x11111111 * i for i in range(8)]


# ---- whole checkpoints -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("tiny-qwen2", tmp_path_factory.mktemp("model") / "m", dtype="float32")


PROMPTS = [prompt_of(length, seed=length) for length in (1, 9, 30)]
WHOLE = [
    Kind(4, 32, sym=False, stored="awq"),
    Kind(4, 32, sym=True, stored="packed"),
    Kind(4, 64, sym=False, desc_act=True, stored="packed"),
    Kind(8, -1, sym=True, stored="packed", scales=torch.bfloat16),
]


@pytest.mark.parametrize("kind", WHOLE, ids=str)
def test_tokens_are_those_of_the_floats_that_are_meant(
    kind: Kind, source: Path, tmp_path: Path
) -> None:
    folder = write(source, tmp_path / "q", kind, skipped=("layers.1.mlp",))
    wanted = engine_tokens(fp32_engine(tmp_path / "q-float"), PROMPTS, 16)
    assert engine_tokens(fp32_engine(folder), PROMPTS, 16) == wanted


def test_the_old_name_of_the_key_is_read_too(source: Path, tmp_path: Path) -> None:
    kind = WHOLE[1]
    folder = write(source, tmp_path / "q", kind)
    edit_config(folder, quantization_config=None, compression_config=kind.config())
    assert engine_tokens(fp32_engine(folder), PROMPTS[:1], 2)


def test_an_index_of_groups_without_an_order_is_passed_over(source: Path, tmp_path: Path) -> None:
    folder = write(source, tmp_path / "q", WHOLE[1])
    module = "model.layers.0.mlp.down_proj"
    num_inputs = load_file(folder / "model.safetensors")[f"{module}.weight_shape"][1]
    none = torch.full((int(num_inputs),), -1, dtype=torch.int32)
    edit_tensors(folder, **{f"{module}.weight_g_idx".replace(".", "/"): none})
    assert engine_tokens(fp32_engine(folder), PROMPTS[:1], 2)


def test_groups_of_modules_may_have_schemes_of_their_own() -> None:
    four, eight = (Kind(bits, 32, stored="packed").config() for bits in (4, 8))
    groups = {
        "a": eight["config_groups"]["group_0"] | {"targets": ["re:.*v_proj", "lm_head"]},
        "b": four["config_groups"]["group_0"],
    }
    found = read_quantization({"quantization_config": four | {"config_groups": groups}}, Path("/"))
    assert found is not None
    bits = {name: found.scheme_of(name).bits for name in ("x.v_proj", "lm_head", "x.q_proj")}
    assert bits == {"x.v_proj": 8, "lm_head": 8, "x.q_proj": 4}


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "gemv"}, "version is 'gemv'"),
        ({"version": "marlin"}, "version is 'marlin'"),
        ({"bits": 8}, "bits is 8"),
        ({"zero_point": False}, "zero_point is false"),
        ({"group_size": 12}, "group_size is 12"),
    ],
)
def test_awq_that_is_not_supported_is_refused(changes: dict[str, Any], words: str) -> None:
    content = {"quantization_config": AWQ_GRID[1].config() | changes}
    with pytest.raises(UnsupportedModel, match=words):
        read_quantization(content, Path("/"))


def _packed(weights: dict[str, Any] | None = None, group: dict[str, Any] | None = None,
            **changes: Any) -> dict[str, Any]:  # fmt: skip
    config = PACKED_GRID[1].config() | changes
    if config["config_groups"]:
        found = config["config_groups"]["group_0"] | (group or {})
        if found["weights"]:
            found["weights"] |= weights or {}
        config["config_groups"] = {"group_0": found}
    return {"quantization_config": config}


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (_packed(format="float-quantized"), UnsupportedModel, "format is 'float-quantized'"),
        (_packed(format="int-quantized"), UnsupportedModel, "format is 'int-quantized'"),
        (_packed(kv_cache_scheme={"num_bits": 8}), UnsupportedModel, "kv_cache_scheme is"),
        (_packed(transform_config={"R1": {}}), UnsupportedModel, "transform_config is"),
        (_packed(quantization_status="frozen"), UnsupportedModel, "quantization_status is"),
        (_packed(sparsity_config={"format": "sparse-24"}), UnsupportedModel, "sparse weights"),
        (_packed(config_groups={}), CheckpointError, "config_groups is"),
        (_packed(group={"weights": None}), UnsupportedModel, "weights are not quantised"),
        (_packed(group={"input_activations": {"num_bits": 8}}), UnsupportedModel,
         "input_activations are quantised"),
        (_packed(group={"targets": []}), CheckpointError, "targets is"),
        (_packed(weights={"type": "float"}), UnsupportedModel, "type is 'float'"),
        (_packed(weights={"num_bits": 3}), UnsupportedModel, "bits is 3"),
        (_packed(weights={"strategy": "tensor"}), UnsupportedModel, "strategy is 'tensor'"),
        (_packed(weights={"dynamic": True}), UnsupportedModel, "dynamic is True"),
        (_packed(weights={"actorder": "random"}), UnsupportedModel, "actorder is 'random'"),
    ],
)  # fmt: skip
def test_compressed_tensors_that_are_not_supported_are_refused(
    content: dict[str, Any], error: type[SetupError], words: str
) -> None:
    with pytest.raises(error, match=words):
        read_quantization(content, Path("/"))


def test_a_shape_that_is_not_the_matrix_is_refused(source: Path, tmp_path: Path) -> None:
    folder = write(source, tmp_path / "q", WHOLE[1])
    name = "model/layers/0/mlp/down_proj/weight_shape"
    edit_tensors(folder, **{name: torch.tensor([1, 2])})
    with pytest.raises(CheckpointError, match=r"weight_shape is \[1, 2\]"):
        fp32_engine(folder)


@pytest.mark.parametrize("kind", WHOLE[:2], ids=str)
def test_tensors_of_another_format_are_refused(kind: Kind, source: Path, tmp_path: Path) -> None:
    folder = write(source, tmp_path / "q", kind)
    edit_config(folder, quantization_config=Kind().config())
    with pytest.raises(SetupError, match=r"lack|shape"):
        fp32_engine(folder)
