"""What the matrices of a model see of a text: sums of x x^T over the inputs of each.

The model's own network in fp32, some layers' sums in memory at a time: the text is read again for
the next ones. Knows the decoder; knows no quantisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..engine.config import EngineConfig
from ..engine.models.config import ModelConfig
from ..engine.models.decoder import Decoder
from ..engine.models.weights import ModelWeights, Preparer, assemble
from ..engine.worker.whole_prompt import CPU, caches_for, whole_prompt
from ..kernels.layout_names import PLAIN
from ..kernels.table import bind
from ..weights_cache.manifest import read_manifest
from ..weights_cache.stream.mapped import MappedWeights

MAX_SUMS_BYTES = 2 << 30
GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Matrices that are computed together see the same inputs."""


class Calibration:
    """`hessians` of some layers at a time; `windows`: token ids, each at most `context_len`."""

    def __init__(self, folder: Path, config: ModelConfig, windows: list[Tensor]) -> None:
        preparer = Preparer(MappedWeights(read_manifest(folder)), CPU, torch.float32)
        self._config = config
        self._weights: ModelWeights = assemble(config, PLAIN, preparer)
        self._windows = windows
        self._context_len = max(map(len, windows))
        self._sums: dict[int, Tensor] = {}

    def layers_at_once(self) -> int:
        c = self._config
        sizes = (c.hidden_size, c.num_heads * c.head_dim, c.hidden_size, c.intermediate_size)
        return max(1, MAX_SUMS_BYTES // sum(4 * size * size for size in sizes))

    def hessians(
        self, layers: range, on_window: Callable[[], None]
    ) -> Iterator[tuple[str, Tensor]]:
        """Module name -> [K, K], of every matrix in these layers."""
        held = {i: self._held(i) for i in layers}
        self._sums = {key: torch.zeros(0) for keys in held.values() for key in keys.values()}
        self._read(on_window)
        for index, keys in held.items():
            for name, key in keys.items():
                for part in GROUPS[name]:
                    kind = "self_attn" if name in ("qkv", "o") else "mlp"
                    yield f"model.layers.{index}.{kind}.{part}", self._sums[key]

    def _held(self, index: int) -> dict[str, int]:
        """Where each matrix lies: that is how a call is known."""
        layer = self._weights.layers[index]
        linears = {"qkv": layer.qkv, "o": layer.o, "gate_up": layer.gate_up, "down": layer.down}
        return {name: linear.weight.data.data_ptr() for name, linear in linears.items()}  # type: ignore[union-attr]

    @torch.inference_mode()
    def _read(self, on_window: Callable[[], None]) -> None:
        kernels = bind(CPU, torch.float32)

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            key = weight.data_ptr()
            if key in self._sums:
                seen = self._sums[key]
                product = x.T @ x
                self._sums[key] = product if seen.numel() == 0 else seen.add_(product)
            return kernels.linear(x, weight, bias)

        decoder = Decoder(
            self._config, self._weights, replace(kernels, linear=linear), self._context_len,
            lambda: None,
        )  # fmt: skip
        settings = EngineConfig(model="", kv_cache_dtype="auto")
        caches = caches_for(self._config, settings, torch.float32, self._context_len)
        for window in self._windows:
            decoder.forward(window, whole_prompt(len(window)), caches)
            on_window()
