"""The tensors of a decoder, fused as the layers read them. Knows checkpoints, not requests.

q, k and v become one matrix, gate and up another: each is allocated once and filled part by part.
Everything else is a view of the mapped file wherever dtype and device agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...weights_cache.stream import MappedWeights
from .config import ModelConfig


@dataclass(frozen=True, slots=True)
class Linear:
    """weight: [out, in]; bias: [out] or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    head: Tensor


class WeightsLoader:
    """Takes tensors by name to one device and dtype; `report` gets the bytes taken so far."""

    def __init__(
        self,
        source: MappedWeights,
        device: torch.device,
        dtype: torch.dtype,
        report: Callable[[int], None],
    ) -> None:
        self._source = source
        self._device = device
        self._dtype = dtype
        self._report = report
        self._num_bytes = 0

    def load(self, config: ModelConfig) -> ModelWeights:
        embedding = self._take("model.embed_tokens.weight")
        layers = [self._layer(config, f"model.layers.{i}.") for i in range(config.num_layers)]
        head = embedding if config.is_tied else self._take("lm_head.weight")
        return ModelWeights(embedding, layers, self._take("model.norm.weight"), head)

    def _layer(self, config: ModelConfig, layer: str) -> LayerWeights:
        attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
        qkv = [f"{attention}{part}_proj" for part in "qkv"]
        gate_up = [f"{mlp}{part}_proj" for part in ("gate", "up")]
        has_norms = config.has_qk_norm
        return LayerWeights(
            input_norm=self._take(f"{layer}input_layernorm.weight"),
            qkv=self._fused(qkv, config.has_qkv_bias),
            q_norm=self._take(f"{attention}q_norm.weight") if has_norms else None,
            k_norm=self._take(f"{attention}k_norm.weight") if has_norms else None,
            o=self._fused([f"{attention}o_proj"], config.has_o_bias),
            post_norm=self._take(f"{layer}post_attention_layernorm.weight"),
            gate_up=self._fused(gate_up, config.has_mlp_bias),
            down=self._fused([f"{mlp}down_proj"], config.has_mlp_bias),
        )

    def _fused(self, names: list[str], has_bias: bool) -> Linear:
        weight = self._stacked([f"{name}.weight" for name in names])
        bias = self._stacked([f"{name}.bias" for name in names]) if has_bias else None
        return Linear(weight, bias)

    def _stacked(self, names: list[str]) -> Tensor:
        """The named tensors one below the other."""
        if len(names) == 1:
            return self._take(names[0])
        parts = [self._source.tensor(name) for name in names]
        rows = [part.shape[0] for part in parts]
        whole = torch.empty(
            (sum(rows), *parts[0].shape[1:]), dtype=self._dtype, device=self._device
        )
        for part, space in zip(parts, whole.split(rows), strict=True):
            space.copy_(part)
            self._count(part)
        return whole

    def _take(self, name: str) -> Tensor:
        tensor = self._source.tensor(name)
        self._count(tensor)
        return tensor.to(self._device, self._dtype)

    def _count(self, tensor: Tensor) -> None:
        self._num_bytes += tensor.nbytes
        self._report(self._num_bytes)
