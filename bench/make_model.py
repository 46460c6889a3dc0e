"""Writes random-weight models in the real Hugging Face checkpoint layout.

    python bench/make_model.py --shape qwen2-0.5b OUT

Knows shapes and the safetensors format; knows nothing of the engine. Weights are made and written
tensor by tensor, so an 8B model needs no more memory than its largest tensor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DTYPES = {
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
    "float32": (torch.float32, "F32"),
}
DEFAULT_SHARD_BYTES = 4 << 30
MAX_NOISE = (1 << 25) - 39
"""A prime number."""


@dataclass(frozen=True)
class Shape:
    """Dimensions of one model; `extra` goes into config.json as it is."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    context_len: int = 512
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        return self.architecture.removesuffix("ForCausalLM").lower()


TINY_LLAMA = Shape("LlamaForCausalLM", 512, 64, 128, 2, 4, 4, 16, False)
TINY_MISTRAL = Shape("MistralForCausalLM", 512, 64, 128, 2, 4, 2, 16, False)
TINY_QWEN2 = Shape(
    "Qwen2ForCausalLM", 512, 64, 128, 2, 4, 2, 16, True, rope_theta=1e6, qkv_bias=True
)
TINY_QWEN3 = Shape(
    "Qwen3ForCausalLM", 512, 64, 128, 2, 4, 2, 32, True, rope_theta=1e6, qk_norm=True
)
TINY_LLAMA3_ROPE = {**LLAMA3_ROPE, "factor": 8.0, "original_max_position_embeddings": 64}

SHAPES: Mapping[str, Shape] = {
    "qwen2-0.5b": Shape(
        "Qwen2ForCausalLM", 32000, 896, 4864, 24, 14, 2, 64, True, 32768, 1e6, qkv_bias=True
    ),
    "llama-3.2-1b": Shape(
        "LlamaForCausalLM", 128256, 2048, 8192, 16, 32, 8, 64, True, 131072, 5e5, LLAMA3_ROPE, 1e-5
    ),
    "llama-3.1-8b": Shape(
        "LlamaForCausalLM", 128256, 4096, 14336, 32, 32, 8, 128, False, 131072, 5e5,
        {**LLAMA3_ROPE, "factor": 8.0}, 1e-5,
    ),
    "tiny-llama": TINY_LLAMA,
    "tiny-llama-gqa": replace(TINY_LLAMA, num_kv_heads=2, tied=True),
    "tiny-llama3": replace(TINY_LLAMA, num_kv_heads=2, rope_scaling=TINY_LLAMA3_ROPE),
    "tiny-llama-linear": replace(
        TINY_LLAMA, rope_scaling={"rope_type": "linear", "factor": 4.0}
    ),
    "tiny-mistral": replace(TINY_MISTRAL, extra={"sliding_window": 16}),
    "tiny-mistral-full": replace(TINY_MISTRAL, extra={"sliding_window": None}),
    "tiny-qwen2": TINY_QWEN2,
    "tiny-qwen2-untied": replace(TINY_QWEN2, tied=False),
    "tiny-qwen3": TINY_QWEN3,
    "tiny-qwen3-untied": replace(TINY_QWEN3, tied=False),
}  # fmt: skip


def write_model(
    shape_name: str,
    out: Path,
    *,
    dtype: str | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Path:
    """Writes a whole checkpoint folder and returns it. Tiny shapes are float32 by default."""
    shape = SHAPES[shape_name]
    if vocab_size is not None:
        shape = replace(shape, vocab_size=vocab_size)
    dtype = dtype or ("float32" if shape_name.startswith("tiny-") else "bfloat16")
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "config.json", config_of(shape, dtype))
    _write_json(out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
    _write_tokenizer(out, shape.vocab_size)
    _write_shards(shape, out, dtype, seed, max_shard_bytes)
    return out


def config_of(shape: Shape, dtype: str) -> dict[str, Any]:
    config = {
        "architectures": [shape.architecture],
        "model_type": shape.model_type,
        "dtype": dtype,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context_len,
        "rope_theta": shape.rope_theta,
        "rope_scaling": shape.rope_scaling,
        "rms_norm_eps": shape.eps,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return config | shape.extra


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint under its Hugging Face name."""
    hidden, q = shape.hidden_size, shape.num_heads * shape.head_dim
    kv = shape.num_kv_heads * shape.head_dim
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for i in range(shape.num_layers):
        layer = f"model.layers.{i}."
        named[layer + "input_layernorm.weight"] = (hidden,)
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            named[f"{layer}self_attn.{part}_proj.weight"] = (rows, hidden)
            if shape.qkv_bias:
                named[f"{layer}self_attn.{part}_proj.bias"] = (rows,)
            if shape.qk_norm and part != "v":
                named[f"{layer}self_attn.{part}_norm.weight"] = (shape.head_dim,)
        named[layer + "self_attn.o_proj.weight"] = (hidden, q)
        named[layer + "post_attention_layernorm.weight"] = (hidden,)
        named[layer + "mlp.gate_proj.weight"] = (shape.intermediate_size, hidden)
        named[layer + "mlp.up_proj.weight"] = (shape.intermediate_size, hidden)
        named[layer + "mlp.down_proj.weight"] = (hidden, shape.intermediate_size)
    named["model.norm.weight"] = (hidden,)
    if not shape.tied:
        named["lm_head.weight"] = (shape.vocab_size, hidden)
    return named


def make_tensor(name: str, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """float32. Norms lie around one; matrices keep the scale of their input."""
    noise = _noise(size, generator)
    if "norm" in name:
        return 1.0 + 0.1 * noise
    if "embed_tokens" in name or name.endswith("bias"):
        return 0.1 * noise
    return noise.mul_(float(size[-1]) ** -0.5)


def _noise(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Of large tensors the same numbers again and again, since eight billion take minutes: in
    another place of each row, so that no two rows are equal."""
    num = torch.Size(size).numel()
    if num <= MAX_NOISE:
        return torch.randn(size, generator=generator)
    noise = torch.randn(MAX_NOISE, generator=generator)
    return noise.repeat(-(-num // MAX_NOISE))[:num].view(size)


def _write_shards(shape: Shape, out: Path, dtype: str, seed: int, max_shard_bytes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shards = list(_shards(tensor_shapes(shape), DTYPES[dtype][0].itemsize, max_shard_bytes))
    index: dict[str, str] = {}
    total_bytes = 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        total_bytes += _write_shard(out / file, names, dtype, generator)
        index |= dict.fromkeys(names, file)
        print(f"shard {number} of {len(shards)}: {total_bytes / 1e9:.2f} GB", file=sys.stderr)
    if len(shards) > 1:
        metadata = {"metadata": {"total_size": total_bytes}, "weight_map": index}
        _write_json(out / "model.safetensors.index.json", metadata)


def _shards(
    named: dict[str, tuple[int, ...]], item_bytes: int, max_shard_bytes: int
) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    num_bytes = 0
    for name, size in named.items():
        tensor_bytes = torch.Size(size).numel() * item_bytes
        if shard and num_bytes + tensor_bytes > max_shard_bytes:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = size
        num_bytes += tensor_bytes
    yield shard


def _write_shard(
    path: Path, named: dict[str, tuple[int, ...]], dtype: str, generator: torch.Generator
) -> int:
    """The safetensors layout: u64 header length, JSON header padded to 8, tensors in order."""
    torch_dtype, code = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in named.items():
        end = offset + torch.Size(size).numel() * torch_dtype.itemsize
        header[name] = {"dtype": code, "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, size in named.items():
            tensor = make_tensor(name, size, generator).to(torch_dtype)
            file.write(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return offset


def _write_tokenizer(out: Path, vocab_size: int) -> None:
    """The demo model's tokenizer where its ids fit; else one token per byte."""
    demo = Path(__file__).resolve().parent.parent / "demo" / "model"
    if vocab_size >= 4096 and (demo / "tokenizer.json").exists():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(demo / name, out / name)
        return
    _byte_tokenizer(out)


def _byte_tokenizer(out: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {c: i for i, c in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(
        out / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"},
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write a random-weight model in real checkpoint layout.",
        epilog="shapes: " + ", ".join(SHAPES),
    )
    parser.add_argument("--shape", required=True, metavar="NAME", help="see the list below")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16; float32 for tiny-*")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, help="instead of the shape's own")
    parser.add_argument("--max-shard-bytes", type=int, default=DEFAULT_SHARD_BYTES)
    args = parser.parse_args()
    if args.shape not in SHAPES:
        parser.error(f"unknown shape {args.shape!r}; choose from: {', '.join(SHAPES)}")
    out = write_model(
        args.shape,
        args.out,
        dtype=args.dtype,
        seed=args.seed,
        vocab_size=args.vocab_size,
        max_shard_bytes=args.max_shard_bytes,
    )
    num_bytes = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    print(json.dumps({"shape": args.shape, "path": str(out), "weight_bytes": num_bytes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
