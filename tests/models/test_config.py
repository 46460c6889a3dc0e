"""config.json: what is refused, by which error, and that the message names field and value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pilotlight.bench.make_model import LLAMA3_ROPE, SHAPES, config_of
from pilotlight.engine.errors import CheckpointError, UnsupportedModel
from pilotlight.engine.models.config import ModelConfig, read_model_config
from pilotlight.engine.models.rope import RopeScaling

ABSENT = object()
"""As a value: the field is left out."""

REFUSALS: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"architectures": ["GPT2LMHeadModel"]}, UnsupportedModel, ("architecture", "GPT2LMHeadModel")),
    ({"architectures": ABSENT}, CheckpointError, ("architectures", "None")),
    ({"architectures": []}, CheckpointError, ("architectures", "[]")),
    ({"architectures": "LlamaForCausalLM"}, CheckpointError, ("architectures", "LlamaForCausalLM")),
    ({"architectures": [7]}, CheckpointError, ("architectures", "[7]")),
    ({"hidden_act": "gelu"}, UnsupportedModel, ("hidden_act", "gelu")),
    ({"partial_rotary_factor": 0.5}, UnsupportedModel, ("partial_rotary_factor", "0.5")),
    ({"pretraining_tp": 2}, UnsupportedModel, ("pretraining_tp", "2")),
    ({"auto_map": {"AutoModel": "x.Y"}}, UnsupportedModel, ("auto_map",)),
    (
        {"quantization_config": {"quant_method": "aqlm", "bits": 4}},
        UnsupportedModel,
        ("quantization_config", "aqlm"),
    ),
    ({"quantization_config": {}}, UnsupportedModel, ("quantization_config", "bits")),
    ({"quantization_config": "aqlm"}, CheckpointError, ("quantization_config", "aqlm")),
    ({"compression_config": {"quant_method": "x"}}, UnsupportedModel, ("compression_config",)),
    ({"hidden_size": ABSENT}, CheckpointError, ("hidden_size", "None")),
    ({"hidden_size": "64"}, CheckpointError, ("hidden_size", "'64'")),
    ({"num_hidden_layers": 0}, CheckpointError, ("num_hidden_layers", "0")),
    ({"num_hidden_layers": True}, CheckpointError, ("num_hidden_layers", "True")),
    ({"vocab_size": -1}, CheckpointError, ("vocab_size", "-1")),
    ({"intermediate_size": 1.5}, CheckpointError, ("intermediate_size", "1.5")),
    ({"max_position_embeddings": [1]}, CheckpointError, ("max_position_embeddings", "[1]")),
    ({"rms_norm_eps": "small"}, CheckpointError, ("rms_norm_eps", "small")),
    ({"rms_norm_eps": 0}, CheckpointError, ("rms_norm_eps", "0")),
    ({"rms_norm_eps": float("inf")}, CheckpointError, ("rms_norm_eps", "inf")),
    ({"tie_word_embeddings": 1}, CheckpointError, ("tie_word_embeddings", "1")),
    ({"attention_bias": "no"}, CheckpointError, ("attention_bias", "no")),
    (
        {"num_attention_heads": 6, "num_key_value_heads": 4},
        CheckpointError,
        ("num_attention_heads 6", "num_key_value_heads 4"),
    ),
    ({"head_dim": 15}, CheckpointError, ("head_dim", "15")),
    ({"head_dim": ABSENT, "hidden_size": 60}, CheckpointError, ("head_dim", "15")),
    ({"head_dim": ABSENT, "hidden_size": 66}, CheckpointError, ("hidden_size", "66", "4")),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, UnsupportedModel, ("rope", "yarn")),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, UnsupportedModel, ("rope", "dynamic")),
    ({"rope_scaling": {"rope_type": "linear"}}, CheckpointError, ("linear", "factor")),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        CheckpointError,
        ("llama3", "low_freq_factor"),
    ),
    (
        {"rope_scaling": {"rope_type": "linear", "factor": -2.0}},
        CheckpointError,
        ("rope scaling", "factor", "-2.0"),
    ),
    (
        {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
        CheckpointError,
        ("rope scaling", "factor", "'2'"),
    ),
    ({"rope_scaling": "yarn"}, CheckpointError, ("rope", "yarn")),
    ({"rope_theta": "big"}, CheckpointError, ("rope_theta", "big")),
    ({"rope_theta": 0}, CheckpointError, ("rope_theta", "0")),
    ({"rope_theta": float("inf")}, CheckpointError, ("rope_theta", "inf")),
    (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        UnsupportedModel,
        ("partial_rotary_factor", "0.25"),
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        UnsupportedModel,
        ("rope", "full_attention"),
    ),
    ({"eos_token_id": "</s>"}, CheckpointError, ("eos_token_id", "</s>")),
    ({"eos_token_id": [1, -1]}, CheckpointError, ("eos_token_id", "-1")),
]

QWEN_REFUSALS: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"sliding_window": "all"}, CheckpointError, ("sliding_window", "all")),
    ({"sliding_window": 0}, CheckpointError, ("sliding_window", "0")),
    ({"use_sliding_window": "yes"}, CheckpointError, ("use_sliding_window", "yes")),
    ({"layer_types": ["full_attention"]}, CheckpointError, ("layer_types", "full_attention")),
    (
        {"layer_types": ["full_attention", "linear_attention"]},
        UnsupportedModel,
        ("layer_types", "linear_attention"),
    ),
    ({"layer_types": 2}, CheckpointError, ("layer_types", "2")),
    ({"layer_types": None, "max_window_layers": "1"}, CheckpointError, ("max_window_layers", "1")),
]


def _folder(tmp_path: Path, shape: str = "tiny-llama", **changes: Any) -> Path:
    content = config_of(SHAPES[shape], "float32") | changes
    content = {key: value for key, value in content.items() if value is not ABSENT}
    (tmp_path / "config.json").write_text(json.dumps(content))
    return tmp_path


def _read(tmp_path: Path, shape: str = "tiny-llama", **changes: Any) -> ModelConfig:
    return read_model_config(_folder(tmp_path, shape, **changes))


def _name(case: object) -> str | None:
    return "-".join(f"{key}" for key in case) if isinstance(case, dict) else ""


@pytest.mark.parametrize(("changes", "error", "named"), REFUSALS, ids=_name)
def test_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], named: tuple[str, ...]
) -> None:
    _check_refusal(_folder(tmp_path, **changes), error, named)


@pytest.mark.parametrize(("changes", "error", "named"), QWEN_REFUSALS, ids=_name)
def test_windows_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], named: tuple[str, ...]
) -> None:
    windowed = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}
    _check_refusal(_folder(tmp_path, "tiny-qwen2", **(windowed | changes)), error, named)


def _check_refusal(folder: Path, error: type[Exception], named: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        read_model_config(folder)
    message = str(caught.value)
    assert caught.type is error
    assert all(part in message for part in named), message
    assert "\n" not in message


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias", "sliding_window", "rope_scaling"])
def test_null_means_not_asked_for(tmp_path: Path, key: str) -> None:
    assert _read(tmp_path, **{key: None}) == _read(tmp_path, **{key: ABSENT})


def test_dimensions_are_taken_as_written(tmp_path: Path) -> None:
    config = _read(tmp_path, "tiny-qwen3", rms_norm_eps=1e-5)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 4, 2)
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (64, 128, 32)
    assert (config.vocab_size, config.max_position_embeddings) == (512, 512)
    assert (config.rope_theta, config.norm_eps, config.is_tied) == (1e6, 1e-5, True)
    assert config.checkpoint_dtype == "float32"


def test_defaults_follow_the_other_fields(tmp_path: Path) -> None:
    config = _read(tmp_path, head_dim=ABSENT, num_key_value_heads=ABSENT, rope_theta=ABSENT)
    assert (config.head_dim, config.num_kv_heads, config.rope_theta) == (16, 4, 10000.0)


@pytest.mark.parametrize(
    ("shape", "changes", "expected"),
    [
        ("tiny-llama", {}, (False, False, False, False)),
        ("tiny-llama", {"attention_bias": True}, (True, True, False, False)),
        ("tiny-llama", {"mlp_bias": True}, (False, False, True, False)),
        ("tiny-qwen2", {}, (True, False, False, False)),
        ("tiny-qwen3", {}, (False, False, False, True)),
        ("tiny-qwen3", {"attention_bias": True}, (True, True, False, True)),
    ],
)
def test_biases_and_norms_of_the_families(
    tmp_path: Path, shape: str, changes: dict[str, Any], expected: tuple[bool, ...]
) -> None:
    c = _read(tmp_path, shape, **changes)
    assert (c.has_qkv_bias, c.has_o_bias, c.has_mlp_bias, c.has_qk_norm) == expected


@pytest.mark.parametrize(
    ("shape", "changes", "expected"),
    [
        ("tiny-mistral", {}, (16, 16)),
        ("tiny-mistral-full", {}, (0, 0)),
        ("tiny-mistral", {"sliding_window": ABSENT}, (4096, 4096)),
        ("tiny-llama", {"sliding_window": 16}, (0, 0)),
        ("tiny-qwen2", {"sliding_window": 16}, (0, 0)),
        ("tiny-qwen2", {"sliding_window": 16, "use_sliding_window": False}, (0, 0)),
        (
            "tiny-qwen2",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
            (0, 16),
        ),
        ("tiny-qwen2", {"use_sliding_window": True, "max_window_layers": 1}, (0, 4096)),
        (
            "tiny-qwen2",
            {"num_hidden_layers": 30, "sliding_window": 16, "use_sliding_window": True},
            (0,) * 28 + (16, 16),
        ),
        (
            "tiny-qwen3",
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (8, 0),
        ),
    ],
)
def test_sliding_windows_are_honoured(
    tmp_path: Path, shape: str, changes: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert _read(tmp_path, shape, **changes).sliding_windows == expected


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_is_read_from_both_places(tmp_path: Path, key: str) -> None:
    config = _read(tmp_path, **{key: LLAMA3_ROPE | {"rope_theta": 5e5}})
    assert config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert config.rope_theta == 5e5


def test_end_tokens_of_generation_config_win(tmp_path: Path) -> None:
    folder = _folder(tmp_path, eos_token_id=3)
    assert read_model_config(folder).eos_token_ids == (3,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert read_model_config(folder).eos_token_ids == (5, 6)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    _check_refusal(tmp_path / "absent", CheckpointError, (str(tmp_path / "absent"), "not a folder"))


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    _check_refusal(tmp_path, CheckpointError, (str(tmp_path), "config.json"))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"", b"[" * 100_000])
def test_invalid_json_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    folder = _folder(tmp_path)
    (folder / file).write_bytes(content)
    _check_refusal(folder, CheckpointError, (str(folder / file), "JSON"))
