"""ModelConfig: config.json read typed and strictly. Knows no torch and no tensors.

Whatever would change the mathematics and is not implemented is refused by name; nothing that is
asked for is ever ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedModel
from .quantization import Quantization, Scheme
from .quantization_config import read_quantization
from .rope import RopeScaling, read_rope

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
DEFAULT_WINDOW = 4096
DEFAULT_MAX_WINDOW_LAYERS = 28
"""What transformers takes for Mistral and Qwen where config.json does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Dimensions and switches of one decoder-only model; the families differ only in these."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    is_tied: bool
    has_qkv_bias: bool
    has_o_bias: bool
    has_mlp_bias: bool
    has_qk_norm: bool
    sliding_windows: tuple[int, ...]
    """Per layer: how many keys a query sees, itself included; 0 means all."""
    checkpoint_dtype: str
    eos_token_ids: tuple[int, ...] = field(default=())
    quantization: Quantization | None = None
    """As the configuration describes it; which matrices it is of, the weights say."""
    quantized: frozenset[str] = frozenset()
    """Those modules; see `names.find_quantized`."""
    rounds_head: bool = False
    """The last product's matrix becomes int8; see rounded_head.py."""

    def scheme_of(self, module: str) -> Scheme | None:
        """None: the module has floats."""
        if self.quantization is None or module not in self.quantized:
            return None
        return self.quantization.scheme_of(module)


def read_model_config(folder: Path) -> ModelConfig:
    """Reads config.json and the end tokens of generation_config.json.

    Raises CheckpointError for files that are not what they should be, UnsupportedModel for models
    that would not be computed exactly.
    """
    if not folder.is_dir():
        way_out = "give the folder of a checkpoint, or hf://org/name for one of the hub"
        raise CheckpointError(f"{folder} is not a folder; {way_out}")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; it is not a checkpoint folder")
    reader = ConfigReader(_read_json(folder / "config.json"))
    generation = folder / "generation_config.json"
    extra = _read_json(generation) if generation.is_file() else {}
    quantization = read_quantization(reader.content, folder)
    eos_token_ids = _eos_token_ids(extra) or _eos_token_ids(reader.content)
    return _model_config(reader, eos_token_ids, quantization)


class ConfigReader:
    """Typed access to config.json; each error names the field and what it holds."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def get(self, key: str) -> Any:
        """None when absent or null: both mean "not asked for" in these files."""
        return self.content.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.content.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise CheckpointError(f"config.json: {key} is {value!r}; a positive integer is needed")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.content.get(key)
        value = default if value is None else value
        if type(value) is int:
            value = float(value)
        if type(value) is not float or not 0 < value < float("inf"):
            raise CheckpointError(f"config.json: {key} is {value!r}; a positive number is needed")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.content.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            raise CheckpointError(f"config.json: {key} is {value!r}; true or false is needed")
        return value

    def only(self, key: str, allowed: Any, default: Any = None) -> None:
        """Refuses any value but `allowed`."""
        value = self.content.get(key)
        value = default if value is None else value
        if value != allowed:
            raise UnsupportedModel(
                f"config.json: {key} is {value!r}; only {allowed!r} is supported"
            )


def _model_config(
    reader: ConfigReader, eos_token_ids: tuple[int, ...], quantization: Quantization | None
) -> ModelConfig:
    architecture = _architecture(reader)
    _refuse_what_is_not_implemented(reader)
    hidden_size = reader.integer("hidden_size")
    num_heads = reader.integer("num_attention_heads")
    num_layers = reader.integer("num_hidden_layers")
    head_dim = _head_dim(reader, hidden_size, num_heads)
    num_kv_heads = reader.integer("num_key_value_heads", num_heads)
    _check_heads(num_heads, num_kv_heads, head_dim)
    is_qwen2, is_qwen3 = architecture.startswith("Qwen2"), architecture.startswith("Qwen3")
    has_bias = reader.flag("attention_bias", False)
    rope_theta, rope_scaling = read_rope(reader)
    return ModelConfig(
        architecture=architecture,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        max_position_embeddings=reader.integer("max_position_embeddings", 2048),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        is_tied=reader.flag("tie_word_embeddings", False),
        has_qkv_bias=is_qwen2 or has_bias,
        has_o_bias=has_bias and not is_qwen2,
        has_mlp_bias=reader.flag("mlp_bias", False),
        has_qk_norm=is_qwen3,
        sliding_windows=_sliding_windows(reader, architecture, num_layers),
        checkpoint_dtype=str(reader.get("dtype") or reader.get("torch_dtype") or "float32"),
        eos_token_ids=eos_token_ids,
        quantization=quantization,
    )


def _architecture(reader: ConfigReader) -> str:
    names = reader.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"config.json: architectures is {names!r}; one name is needed")
    if names[0] not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModel(f"config.json: architecture {names[0]!r} is not one of {known}")
    return names[0]


def _refuse_what_is_not_implemented(reader: ConfigReader) -> None:
    reader.only("hidden_act", "silu", "silu")
    reader.only("partial_rotary_factor", 1.0, 1.0)
    reader.only("pretraining_tp", 1, 1)
    if reader.get("auto_map") is not None:
        raise UnsupportedModel("config.json: auto_map asks to run code from the checkpoint")


def _head_dim(reader: ConfigReader, hidden_size: int, num_heads: int) -> int:
    if reader.get("head_dim") is None and hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads "
            f"{num_heads}, and there is no head_dim"
        )
    return reader.integer("head_dim", hidden_size // num_heads)


def _check_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {num_heads} is not a multiple of "
            f"num_key_value_heads {num_kv_heads}"
        )
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim is {head_dim}; rotary needs an even one")


def _sliding_windows(reader: ConfigReader, architecture: str, num_layers: int) -> tuple[int, ...]:
    # Absent and null differ here: transformers' default for these families is a window.
    window = reader.content.get("sliding_window", DEFAULT_WINDOW)
    if window is None or architecture.startswith("Llama"):
        return (0,) * num_layers
    window = reader.integer("sliding_window", DEFAULT_WINDOW)
    if architecture.startswith("Mistral"):
        return (window,) * num_layers
    if not reader.flag("use_sliding_window", False):
        return (0,) * num_layers
    return tuple(
        window if kind == "sliding_attention" else 0 for kind in _kinds(reader, num_layers)
    )


def _kinds(reader: ConfigReader, num_layers: int) -> list[str]:
    """Qwen: `layer_types` where given, else full attention below `max_window_layers`."""
    kinds = reader.get("layer_types")
    if kinds is None:
        first = reader.get("max_window_layers")
        first = DEFAULT_MAX_WINDOW_LAYERS if first is None else first
        if type(first) is not int or first < 0:
            raise CheckpointError(f"config.json: max_window_layers is {first!r}; no layer number")
        return ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise CheckpointError(f"config.json: layer_types is {kinds!r}; {num_layers} are needed")
    unknown = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise UnsupportedModel(f"config.json: layer_types has {unknown[0]!r}; not supported")
    return kinds


def _eos_token_ids(content: dict[str, Any]) -> tuple[int, ...]:
    value = content.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(f"eos_token_id is {value!r}; token ids are needed")
    return tuple(ids)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content
