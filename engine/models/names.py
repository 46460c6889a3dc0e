"""Which tensors a checkpoint must hold, by Hugging Face name and shape. Knows no torch.

The check runs on headers alone, so a wrong checkpoint is refused before torch is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from ...weights_cache.manifest import Manifest
from ..errors import CheckpointError
from .config import ModelConfig
from .quantization import quantized_modules, shapes_of

FLOATS = ("F32", "F16", "BF16")
INTEGERS = {
    "qweight": ("I32",), "qzeros": ("I32",), "g_idx": ("I32",),
    "weight_packed": ("I32",), "weight_zero_point": ("I32",), "weight_g_idx": ("I32",),
    "weight_shape": ("I64", "I32"),
}  # fmt: skip
"""dtypes of what is not floats, by the last part of the name."""
HARMLESS = re.compile(r"rotary_emb\.inv_freq$")
"""Constants that older writers stored; they follow from config.json."""


def find_quantized(config: ModelConfig, manifest: Manifest) -> ModelConfig:
    """With the modules that have integers. Raises CheckpointError where nothing explains them."""
    found = quantized_modules(manifest.tensors)
    if found and config.quantization is None:
        raise CheckpointError(
            f"the weights of {min(found)} are integers, but neither config.json nor "
            "quantize_config.json says how it is quantised"
        )
    return replace(config, quantized=found)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that will be read: name -> shape."""
    hidden, vocab = config.hidden_size, config.vocab_size
    expected: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config.num_layers):
        expected |= _layer_tensors(config, f"model.layers.{i}.")
    expected["model.norm.weight"] = (hidden,)
    if not config.is_tied:
        expected |= matrix_tensors(config, "lm_head", vocab, hidden)
    return expected


def matrix_tensors(
    config: ModelConfig, module: str, rows: int, columns: int
) -> dict[str, tuple[int, ...]]:
    scheme = config.scheme_of(module)
    if scheme is None:
        return {f"{module}.weight": (rows, columns)}
    return shapes_of(module, scheme, rows, columns)


def _layer_tensors(config: ModelConfig, layer: str) -> dict[str, tuple[int, ...]]:
    hidden, q = config.hidden_size, config.num_heads * config.head_dim
    kv, intermediate = config.num_kv_heads * config.head_dim, config.intermediate_size
    linears = {
        "self_attn.q_proj": (q, hidden, config.has_qkv_bias),
        "self_attn.k_proj": (kv, hidden, config.has_qkv_bias),
        "self_attn.v_proj": (kv, hidden, config.has_qkv_bias),
        "self_attn.o_proj": (hidden, q, config.has_o_bias),
        "mlp.gate_proj": (intermediate, hidden, config.has_mlp_bias),
        "mlp.up_proj": (intermediate, hidden, config.has_mlp_bias),
        "mlp.down_proj": (hidden, intermediate, config.has_mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer}input_layernorm.weight": (hidden,),
        f"{layer}post_attention_layernorm.weight": (hidden,),
    }
    for name, (rows, columns, has_bias) in linears.items():
        shapes |= matrix_tensors(config, f"{layer}{name}", rows, columns)
        if has_bias:
            shapes[f"{layer}{name}.bias"] = (rows,)
    if config.has_qk_norm:
        shapes[f"{layer}self_attn.q_norm.weight"] = (config.head_dim,)
        shapes[f"{layer}self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def check_tensors(config: ModelConfig, manifest: Manifest) -> None:
    """Raises CheckpointError naming the first tensor that is missing, misshapen or unknown."""
    expected = expected_tensors(config)
    _check_present(expected, manifest)
    _check_unknown(config, expected, manifest)


def _check_present(expected: Mapping[str, tuple[int, ...]], manifest: Manifest) -> None:
    missing = [name for name in expected if name not in manifest.tensors]
    if missing:
        raise CheckpointError(f"the weights lack {missing[0]}{_and_more(missing)}")
    for name, shape in expected.items():
        span = manifest.tensors[name]
        if span.shape != shape:
            raise CheckpointError(
                f"{name} has the shape {list(span.shape)}; config.json implies {list(shape)}"
            )
        wanted = INTEGERS.get(name.rpartition(".")[2], FLOATS)
        if span.dtype not in wanted:
            raise CheckpointError(
                f"{name} has the dtype {span.dtype}; {' or '.join(wanted)} is needed"
            )


def _check_unknown(
    config: ModelConfig, expected: Mapping[str, tuple[int, ...]], manifest: Manifest
) -> None:
    # Writers of tied models often store the shared matrix a second time.
    harmless = {"lm_head.weight"} if config.is_tied else set()
    # An order that is the natural one, and biases of zeros; both are looked at when loaded.
    extra = ("g_idx", "weight_g_idx", "bias")
    harmless |= {f"{module}.{part}" for module in config.quantized for part in extra}
    unknown = [
        name
        for name in manifest.tensors
        if name not in expected and name not in harmless and not HARMLESS.search(name)
    ]
    if unknown:
        raise CheckpointError(
            f"the weights hold {unknown[0]}{_and_more(unknown)}, which {config.architecture} "
            "would leave unused; config.json and weights do not belong together"
        )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
