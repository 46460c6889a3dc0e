"""The one network: a pre-norm decoder with grouped-query attention over paged blocks.

Llama, Mistral, Qwen2 and Qwen3 are this network with other switches in ModelConfig. Knows kernels
and weights; knows no requests, slots or sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...kernels.layout_names import PAIRED, PLAIN
from ...kernels.table import Kernels
from .config import ModelConfig
from .rope import inverse_frequencies
from .weights import LayerWeights, Linear, Linears, Matrix, ModelWeights, QuantizedMatrix


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where each token of a step sits. T tokens, R rows; all int32 on the device.

    slot_mapping: [T] cell of the cache that takes the token's key and value, -1 for none;
    block_tables: [R, blocks]; query_start: [R + 1]; context_lens: [R], this step's tokens included.
    """

    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    query_start: Tensor
    context_lens: Tensor


@dataclass(frozen=True, slots=True)
class LayerCache:
    """k, v: [num_blocks, block_size, num_kv_heads, head_dim]; int8 with scales; int16 as panels."""

    k: Tensor
    v: Tensor
    scales: tuple[Tensor, Tensor] | None = None
    """Each [num_blocks, block_size, num_kv_heads], fp32, or panels."""


class Decoder:
    """Computes hidden states and logits; `pulse` is called once per layer."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        kernels: Kernels,
        context_len: int,
        pulse: Callable[[], None],
    ) -> None:
        self._config = config
        self._weights = weights
        self._head = Linear(weights.head, None)
        self._kernels = kernels
        self.pulse = pulse
        self._cos_sin = rope_table(config, context_len).to(weights.norm.device)
        self._heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self._scale = config.head_dim**-0.5

    def forward(self, token_ids: Tensor, batch: AttentionBatch, caches: list[LayerCache]) -> Tensor:
        """token_ids: [T] -> hidden states behind the last norm: [T, hidden_size]."""
        kernels, eps = self._kernels, self._config.norm_eps
        layers = self._weights.layers
        residual = self._embed(token_ids)
        x = kernels.rms_norm(residual, layers[0].input_norm, eps)
        next_norms = [layer.input_norm for layer in layers[1:]] + [self._weights.norm]
        for i, layer in enumerate(layers):
            x = self._attend(x, layer, i, batch, caches[i])
            x = kernels.add_rms_norm(x, residual, layer.post_norm, eps)
            x = self._linear(self._gated(x, layer.gate_up), layer.down)
            x = kernels.add_rms_norm(x, residual, next_norms[i], eps)
            self.pulse()
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [S, hidden_size] -> [S, vocab_size]."""
        return self._linear(hidden, self._head)

    def sample(self, logits: Tensor, draws: Tensor) -> Tensor:
        """logits: [S, vocab_size], draws: [S, DRAW_WORDS] -> int32 [S], -1 for a row that is not
        finite."""
        return self._kernels.sample(logits, draws)

    def _attend(
        self, x: Tensor, layer: LayerWeights, index: int, batch: AttentionBatch, cache: LayerCache
    ) -> Tensor:
        kernels = self._kernels
        qkv = self._linear(x, layer.qkv).view(x.shape[0], -1, self._config.head_dim)
        q, k, v = qkv.split(self._heads, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = kernels.rms_norm(q, layer.q_norm, self._config.norm_eps)
            k = kernels.rms_norm(k, layer.k_norm, self._config.norm_eps)
        window = self._config.sliding_windows[index]
        rows, keys = (q, k, v, self._cos_sin, batch.positions), (cache.k, cache.v)
        lists = batch.block_tables, batch.query_start, batch.context_lens
        if cache.scales is None:
            kernels.rope_store_kv(*rows, *keys, batch.slot_mapping)
            out = kernels.paged_attention(q, *keys, *lists, self._scale, window)
        else:
            is_bytes = cache.k.dtype is torch.int8
            store = kernels.rope_store_kv_int8 if is_bytes else kernels.rope_store_kv_int16
            attention = kernels.paged_attention_int8 if is_bytes else kernels.paged_attention_int16
            store(*rows, *keys, *cache.scales, batch.slot_mapping)
            out = attention(q, *keys, *cache.scales, *lists, self._scale, window)
        return self._linear(out, layer.o)

    # ---- by layout ---------------------------------------------------------------------------

    def _embed(self, token_ids: Tensor) -> Tensor:
        table = self._weights.embedding
        if table.layout == PLAIN:
            return functional.embedding(token_ids, table.data)
        return self._kernels.packed_embedding(
            token_ids, table.data, table.num_outputs, table.num_inputs
        )

    def _linear(self, x: Tensor, linear: Linears) -> Tensor:
        if isinstance(linear, tuple):
            return torch.cat([self._linear(x, part) for part in linear], dim=-1)
        weight = linear.weight
        if isinstance(weight, QuantizedMatrix):
            groups = weight.scales, weight.zeros, weight.order
            sizes = weight.scheme.bits, weight.scheme.group_len(weight.num_inputs)
            return self._kernels.quantized_linear(
                x, weight.words, *groups, linear.bias, *sizes, weight.num_outputs
            )
        if weight.layout == PLAIN:
            return self._kernels.linear(x, weight.data, linear.bias)
        return self._kernels.packed_linear(x, weight.data, linear.bias, weight.num_outputs)

    def _gated(self, x: Tensor, gate_up: Linears) -> Tensor:
        """silu(gate) * up."""
        weight = gate_up.weight if isinstance(gate_up, Linear) else None
        if isinstance(weight, Matrix) and weight.layout.endswith(PAIRED):
            return self._kernels.packed_gate_up(x, weight.data)
        return self._kernels.silu_mul(self._linear(x, gate_up))


def rope_table(config: ModelConfig, context_len: int) -> Tensor:
    """[context_len, head_dim] fp32: cosines of the angles, then their sines."""
    frequencies = torch.tensor(
        inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling),
        dtype=torch.float32,
    )
    # Angles in fp32, as the models were trained with.
    angles = torch.outer(torch.arange(context_len, dtype=torch.float32), frequencies)
    table = torch.empty(context_len, 2, len(frequencies))
    # One by one into memory that lies together: torch takes twice as long over gaps.
    values = torch.empty_like(angles)
    for half, function in enumerate((torch.cos, torch.sin)):
        table[:, half] = function(angles, out=values)
    return table.view(context_len, -1)
