"""Which tensors a prepared model consists of, and which of the checkpoint's each is made from.

One list for everybody: loading a checkpoint, writing an artefact, and reading one. Knows names,
shapes and layouts by name; knows no torch and no bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...kernels.layout_names import INT4, INT8, PAIRED, PANEL, PLAIN
from .config import ModelConfig
from .quantization import ROUNDED_HEAD, Scheme


@dataclass(frozen=True, slots=True)
class Recipe:
    """`parts` of the checkpoint one below the other, in `layout`; `shape` is that of the stack.

    Tensors of one `section` lie together in an artefact. A quantised matrix is up to four tensors,
    each made from its `parts`, which are then modules: `role` says which, `scheme` how.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    layout: str
    section: str
    role: str = ""
    """words, scales, zeros or order; empty: floats."""
    scheme: Scheme | None = None


def recipes(config: ModelConfig, layout: str) -> list[Recipe]:
    """All tensors in the order in which a step reads them; matrices in `layout`."""
    vocab = (config.vocab_size, config.hidden_size)
    found = [Recipe("embedding", ("model.embed_tokens.weight",), vocab, layout, "embedding")]
    for index in range(config.num_layers):
        found += _layer(config, index, layout)
    norm = ("model.norm.weight",)
    found.append(Recipe("norm", norm, (config.hidden_size,), PLAIN, "head"))
    head = quantized(config, "head", ("lm_head",), vocab, "head")
    if head:
        found += head
    elif config.rounds_head:
        found += _rounded_head(config, vocab)
    elif not config.is_tied:
        found.append(Recipe("head", ("lm_head.weight",), vocab, layout, "head"))
    return found


def quantized(
    config: ModelConfig, name: str, modules: tuple[str, ...], shape: tuple[int, int], section: str
) -> list[Recipe]:
    """The tensors of a quantised matrix, whose modules are alike; none where they have floats."""
    scheme = config.scheme_of(modules[0])
    if scheme is None:
        return []
    roles = ["words", "scales"]
    roles += [] if scheme.is_symmetric else ["zeros"]
    roles += ["order"] if scheme.has_order else []
    layout = INT4 if scheme.bits == 4 else INT8
    return [
        Recipe(f"{name}.{role}", modules, shape, layout, section, role, scheme) for role in roles
    ]


def _rounded_head(config: ModelConfig, vocab: tuple[int, int]) -> list[Recipe]:
    part = "model.embed_tokens.weight" if config.is_tied else "lm_head.weight"
    return [
        Recipe(f"head.{role}", (part,), vocab, INT8, "head", role, ROUNDED_HEAD)
        for role in ("words", "scales")
    ]


def are_alike(config: ModelConfig, modules: tuple[str, ...]) -> bool:
    """Whether they can be one matrix; else each is one, named by its place."""
    return len({config.scheme_of(module) for module in modules}) == 1


def _layer(config: ModelConfig, index: int, layout: str) -> Iterator[Recipe]:
    hidden, prefix = config.hidden_size, f"model.layers.{index}."
    section = f"layers.{index}"
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    qkv = tuple(f"{attention}{part}_proj" for part in "qkv")
    gate_up = tuple(f"{mlp}{part}_proj" for part in ("gate", "up"))

    def vector(name: str, *parts: str, size: int) -> Recipe:
        return Recipe(f"{section}.{name}", parts, (size,), PLAIN, section)

    def matrix(name: str, modules: tuple[str, ...], rows: int, columns: int) -> Recipe:
        parts = tuple(f"{module}.weight" for module in modules)
        packed = layout + PAIRED if is_paired(config, layout) and name == "gate_up" else layout
        return Recipe(f"{section}.{name}.weight", parts, (rows, columns), packed, section)

    def bias(name: str, modules: tuple[str, ...], size: int) -> Recipe:
        return vector(f"{name}.bias", *(f"{module}.bias" for module in modules), size=size)

    wide = config.intermediate_size
    linears = (
        ("qkv", qkv, (q, kv, kv), hidden, config.has_qkv_bias),
        ("o", (f"{attention}o_proj",), (hidden,), q, config.has_o_bias),
        ("gate_up", gate_up, (wide, wide), hidden, config.has_mlp_bias),
        ("down", (f"{mlp}down_proj",), (hidden,), wide, config.has_mlp_bias),
    )
    yield vector("input_norm", f"{prefix}input_layernorm.weight", size=hidden)
    if config.has_qk_norm:
        yield vector("q_norm", f"{attention}q_norm.weight", size=config.head_dim)
        yield vector("k_norm", f"{attention}k_norm.weight", size=config.head_dim)
    yield vector("post_norm", f"{prefix}post_attention_layernorm.weight", size=hidden)
    for name, modules, rows, columns, has_bias in linears:
        pieces = [(name, modules, sum(rows))]
        if not are_alike(config, modules):
            pieces = [(f"{name}.{i}", (modules[i],), size) for i, size in enumerate(rows)]
        for piece, some, size in pieces:
            integers = quantized(config, f"{section}.{piece}", some, (size, columns), section)
            yield from integers or [matrix(piece, some, size, columns)]
            if has_bias:
                yield bias(piece, some, size)


def is_paired(config: ModelConfig, layout: str) -> bool:
    """Gate and up are computed together where the layout is packed and they have no bias."""
    whole_panels = config.intermediate_size % PANEL == 0
    return layout != PLAIN and whole_panels and not config.has_mlp_bias
