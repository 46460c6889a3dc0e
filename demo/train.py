"""Trains the built-in model from nothing, on a CPU: a small Llama that completes Python.

    python demo/train.py --epochs 2 --out demo/model

Knows nothing of the engine: the model below is plain torch, and what it writes is an ordinary
Hugging Face checkpoint (LlamaForCausalLM, bfloat16 safetensors, tokenizer.json).

Corpus rule: every *.py file of the running Python's standard library, in sorted order, outside
test, tests, idlelib, lib2to3, site-packages, turtledemo, ensurepip and __pycache__. A file is
held out when the first byte of sha256(relative path) is below 8 (about 3 %).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

SKIPPED = {
    "test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip",
    "__pycache__",
}  # fmt: skip
END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    context_len: int = 2048
    rope_theta: float = 10000.0
    eps: float = 1e-5


# ---- corpus ----------------------------------------------------------------------------------


def corpus_files(root: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED.intersection(relative.parts):
            yield relative.as_posix(), path


def is_held_out(relative: str) -> bool:
    return hashlib.sha256(relative.encode()).digest()[0] < 8


def read_corpus(root: Path) -> tuple[list[str], list[str]]:
    """Texts to train on and texts held out."""
    train: list[str] = []
    held_out: list[str] = []
    for relative, path in corpus_files(root):
        text = path.read_text(encoding="utf-8", errors="ignore").replace("\r\n", "\n")
        if text.strip():
            (held_out if is_held_out(relative) else train).append(text)
    return train, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # Runs of spaces stay whole, so that one token is one level of indentation.
    split = pre_tokenizers.Split(
        pattern=Regex(r" ?[A-Za-z_]+|[0-9]| ?[^\sA-Za-z_0-9]+|\n+|[ \t]+(?=\S)|\s+"),
        behavior="isolated",
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, TURN, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """One stream: each text between end markers."""
    end: int = tokenizer.token_to_id(END)  # type: ignore[assignment]
    ids = [end]
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids += encoding.ids
        ids.append(end)
    return torch.tensor(ids, dtype=torch.int32)


# ---- model -----------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        q, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        self.input_layernorm = nn.Parameter(torch.ones(s.hidden_size))
        self.post_attention_layernorm = nn.Parameter(torch.ones(s.hidden_size))
        self.q_proj = _matrix(q, s.hidden_size)
        self.k_proj = _matrix(kv, s.hidden_size)
        self.v_proj = _matrix(kv, s.hidden_size)
        self.o_proj = _matrix(s.hidden_size, q, 1 / math.sqrt(2 * s.num_layers))
        self.gate_proj = _matrix(s.intermediate_size, s.hidden_size)
        self.up_proj = _matrix(s.intermediate_size, s.hidden_size)
        self.down_proj = _matrix(
            s.hidden_size, s.intermediate_size, 1 / math.sqrt(2 * s.num_layers)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attend(norm(x, self.input_layernorm, self.s.eps), cos, sin)
        h = norm(x, self.post_attention_layernorm, self.s.eps)
        hidden = F.silu(F.linear(h, self.gate_proj)) * F.linear(h, self.up_proj)
        return x + F.linear(hidden, self.down_proj)

    def attend(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s, (batch, length, _) = self.s, h.shape
        q = F.linear(h, self.q_proj).view(batch, length, s.num_heads, s.head_dim).transpose(1, 2)
        k = F.linear(h, self.k_proj).view(batch, length, s.num_kv_heads, -1).transpose(1, 2)
        v = F.linear(h, self.v_proj).view(batch, length, s.num_kv_heads, -1).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        groups = s.num_heads // s.num_kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(out.transpose(1, 2).reshape(batch, length, -1), self.o_proj)


class Model(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Parameter(torch.randn(s.vocab_size, s.hidden_size) * 0.02)
        self.layers = nn.ModuleList(Block(s) for _ in range(s.num_layers))
        self.norm = nn.Parameter(torch.ones(s.hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.embed_tokens)
        cos, sin = rope_tables(self.s, ids.shape[1])
        for layer in self.layers:
            x = layer(x, cos.to(x.dtype), sin.to(x.dtype))
        return F.linear(norm(x, self.norm, self.s.eps), self.embed_tokens)


def _matrix(rows: int, columns: int, gain: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * gain / math.sqrt(columns))


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def rope_tables(s: Shape, length: int) -> tuple[Tensor, Tensor]:
    frequencies = s.rope_theta ** (-torch.arange(0, s.head_dim, 2) / s.head_dim)
    angles = torch.outer(torch.arange(length), frequencies)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


# ---- optimiser -------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by a Newton-Schulz iteration, for matrices (Jordan et al., 2024)."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * 0.05)
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(g: Tensor, num_iterations: int = 5) -> Tensor:
    """Brings the singular values of `g` near one."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(num_iterations):
        m = x @ x.T
        x = a * x + (b * m + c * m @ m) @ x
    return x.T if g.shape[0] > g.shape[1] else x


# ---- training --------------------------------------------------------------------------------


def batches(stream: Tensor, length: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Every window of the stream once per epoch, at a new offset each time."""
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        num_windows = (len(stream) - offset - 1) // length
        order = torch.randperm(num_windows, generator=generator)
        for i in range(0, num_windows - size + 1, size):
            starts = offset + order[i : i + size] * length
            yield torch.stack([stream[s : s + length + 1] for s in starts.tolist()]).long()


def autocast() -> torch.autocast:
    """bfloat16 where the CPU multiplies it; elsewhere it would be emulated, slowly."""
    is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=is_fast)


def loss_of(model: Callable[[Tensor], Tensor], window: Tensor) -> Tensor:
    with autocast():
        logits = model(window[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(
    model: Model, tokenizer: Tokenizer, texts: list[str], length: int = 1024
) -> float:
    """Of held-out texts, each read in windows of at most `length` tokens, in bfloat16 weights."""
    end = tokenizer.token_to_id(END)
    nats = 0.0
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids = torch.tensor([end, *encoding.ids])
        for start in range(0, len(ids) - 1, length):
            window = ids[start : start + length + 1]
            with autocast():
                logits = model(window[None, :-1])[0]
            nats += F.cross_entropy(logits.float(), window[1:], reduction="sum").item()
    num_bytes = sum(len(text.encode()) for text in texts)
    return nats / math.log(2) / num_bytes


def train(
    model: Model, stream: Tensor, args: argparse.Namespace, on_pause: Callable[[], None]
) -> tuple[int, int]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices, args.muon_lr)
    adam = torch.optim.AdamW(others, args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    peaks = [(muon, args.muon_lr), (adam, args.adam_lr)]
    generator = torch.Generator().manual_seed(args.seed)
    compiled = torch.compile(model)
    num_steps = int(args.epochs * len(stream)) // (args.batch * args.length)
    began_s, step, paused_s = time.monotonic(), 0, time.monotonic()
    for window in batches(stream, args.length, args.batch, generator):
        done = step / num_steps
        if done >= 1:
            break
        for optimiser, peak in peaks:
            optimiser.param_groups[0]["lr"] = peak * min(1, (step + 1) / 50) * (1 - done)
        loss = loss_of(compiled, window)
        loss.backward()
        for optimiser, _ in peaks:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0:
            rate = step * args.batch * args.length / (time.monotonic() - began_s)
            print(
                f"{done:6.1%} step {step} loss {loss.item():.3f} {rate:.0f} tok/s", file=sys.stderr
            )
        if time.monotonic() - paused_s > 600:
            on_pause()
            paused_s = time.monotonic()
    return step, step * args.batch * args.length


# ---- export ----------------------------------------------------------------------------------


def tensors_of(model: Model) -> dict[str, Tensor]:
    """Names and layout of LlamaForCausalLM, bfloat16."""
    named = {}
    for name, p in model.named_parameters():
        if name.startswith("layers."):
            _, index, leaf = name.split(".")
            part = "self_attn." if leaf[0] in "qkvo" and "proj" in leaf else "mlp."
            part = "" if "layernorm" in leaf else part
            name = f"layers.{index}.{part}{leaf}"
        named[f"model.{name}.weight"] = p.detach().to(torch.bfloat16).contiguous()
    return named


def take_weights(model: Model, folder: Path) -> None:
    """The weights of an earlier run, whose tokenizer must be the same."""
    tensors = load_file(folder / "model.safetensors")
    for parameter, name in zip(model.parameters(), tensors_of(model), strict=True):
        parameter.data.copy_(tensors[name])


def export(model: Model, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    s, end = model.s, tokenizer.token_to_id(END)
    turn_end = tokenizer.token_to_id(TURN_END)
    save_file(tensors_of(model), out / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "vocab_size": s.vocab_size, "hidden_size": s.hidden_size,
        "intermediate_size": s.intermediate_size, "num_hidden_layers": s.num_layers,
        "num_attention_heads": s.num_heads, "num_key_value_heads": s.num_kv_heads,
        "head_dim": s.head_dim, "max_position_embeddings": s.context_len,
        "rope_theta": s.rope_theta, "rope_scaling": None, "rms_norm_eps": s.eps,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": True, "bos_token_id": end, "eos_token_id": end,
    }  # fmt: skip
    generation = {"bos_token_id": end, "eos_token_id": [end, turn_end]}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END,
        "model_max_length": s.context_len, "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, default=2, help="times that each token is seen")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    help_text = "go on from this checkpoint; the learning rates start anew"
    parser.add_argument("--init", type=Path, metavar="FOLDER", help=help_text)
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    train_texts, held_out = read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    shape = Shape()
    tokenizer = train_tokenizer(train_texts, shape.vocab_size)
    stream = encode(tokenizer, train_texts)
    num_bytes = sum(len(t.encode()) for t in train_texts)
    model = Model(shape)
    if args.init:
        take_weights(model, args.init)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_bytes} bytes, {len(stream)} tokens, {num_parameters} parameters", file=sys.stderr)
    num_steps, num_tokens = train(model, stream, args, lambda: export(model, tokenizer, args.out))
    model.to(torch.bfloat16).float()
    export(model, tokenizer, args.out)
    report = {
        "bits_per_byte": round(bits_per_byte(model, tokenizer, held_out), 4),
        "num_parameters": num_parameters, "num_steps": num_steps, "num_tokens": num_tokens,
        "train_bytes": num_bytes, "held_out_bytes": sum(len(t.encode()) for t in held_out),
        "bytes_per_token": round(num_bytes / len(stream), 3), "epochs": args.epochs,
    }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
