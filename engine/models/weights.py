"""The tensors of a decoder: prepared from a checkpoint, or taken as they lie in an artefact.

Knows recipes, checkpoints' tensors and layouts; knows no files of the cache and no requests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.layout_names import PAIRED, PLAIN
from ...kernels.layouts import pack, pack_paired
from ...weights_cache.stream.mapped import MappedWeights
from ..errors import CheckpointError
from ..messages import WeightsFacts
from . import gptq
from .config import ModelConfig
from .quantization import NAMES, PACKED, ROUNDED_HEAD, Scheme
from .recipes import Recipe, recipes
from .rounded_head import rounded
from .stored import as_gptq


@dataclass(frozen=True, slots=True)
class Matrix:
    """[num_outputs, num_inputs], stored in `layout`."""

    data: Tensor
    layout: str
    num_outputs: int
    num_inputs: int


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """[num_outputs, num_inputs] of integers; see kernels/quantized.py for the tensors."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    scheme: Scheme
    num_outputs: int
    num_inputs: int


@dataclass(frozen=True, slots=True)
class Linear:
    """bias: [num_outputs] or None."""

    weight: Matrix | QuantizedMatrix
    bias: Tensor | None


Linears = Linear | tuple[Linear, ...]
"""One matrix, or several whose outputs lie side by side: they are not quantised alike."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    input_norm: Tensor
    qkv: Linears
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: Linears
    down: Linear


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embedding: Matrix
    layers: list[LayerWeights]
    norm: Tensor
    head: Matrix | QuantizedMatrix


class Preparer:
    """Makes a recipe's tensor from its parts; `report` gets the checkpoint's bytes used so far.

    A part that needs no change is a view of the mapped file; all others are made once, by one copy.
    """

    def __init__(
        self,
        source: MappedWeights,
        device: torch.device,
        dtype: torch.dtype,
        report: Callable[[int], None] = lambda num_bytes: None,
        biases: Collection[str] = (),
    ) -> None:
        """`biases`: names of those that the network has."""
        self._biases = biases
        self._source = source
        self._device = device
        self._dtype = dtype
        self._report = report
        self._num_bytes = self._num_mapped_bytes = 0
        self._num_copied_bytes = self._num_copied_tensors = 0

    def facts(self, spent_s: float) -> WeightsFacts:
        """What was handed over, if all of it took `spent_s`."""
        copied = self._num_copied_bytes
        return WeightsFacts(
            "checkpoint",
            mapped_bytes=self._num_mapped_bytes,
            copied_bytes=copied,
            num_copied_tensors=self._num_copied_tensors,
            copy_bytes_per_s=copied / spent_s,
        )

    def __call__(self, recipe: Recipe) -> Tensor:
        if recipe.scheme is ROUNDED_HEAD:
            return self._copied(rounded(recipe.role, self._source.tensor(*recipe.parts)))
        if recipe.scheme is not None:
            return self._integers(recipe, recipe.scheme)
        parts = [self._source.tensor(name) for name in recipe.parts]
        tensor = self._made(recipe, parts)
        self._num_bytes += sum(part.nbytes for part in parts)
        self._report(self._num_bytes)
        return tensor

    def _integers(self, recipe: Recipe, scheme: Scheme) -> Tensor:
        """One tensor of a quantised matrix; `parts` are its modules."""
        modules = recipe.parts

        def part(name: str) -> list[Tensor]:
            stored = NAMES[scheme.stored][name]
            found = [self._source.tensor(f"{module}.{stored}") for module in modules]
            self._num_bytes += sum(t.nbytes for t in found)
            return [as_gptq(name, t, scheme) for t in found]

        match recipe.role:
            case "words":
                self._check_beside(modules, scheme)
                tensor = gptq.words(part("qweight"), self._order(modules, scheme), scheme)
            case "scales":
                tensor = gptq.scales(part("scales"))
            case "zeros":
                tensor = gptq.zeros(part("qzeros"), scheme)
            case _:
                order = self._order(modules, scheme)
                assert order is not None
                tensor = order
        self._report(self._num_bytes)
        return self._copied(tensor.to(self._device))

    def _order(self, modules: tuple[str, ...], scheme: Scheme) -> Tensor | None:
        name = NAMES[scheme.stored]["g_idx"]
        found = {module: self._source.find(f"{module}.{name}") for module in modules}
        # compressed-tensors: -1 where there is no order.
        told = {m: g for m, g in found.items() if g is not None and not (g == -1).all()}
        return gptq.common_order(told, scheme)

    def _check_beside(self, modules: tuple[str, ...], scheme: Scheme) -> None:
        """What is in the files and not needed must be what it is taken for."""
        for module in modules:
            if scheme.stored == PACKED:
                self._check_shape(module, scheme)
            elif scheme.is_symmetric:
                gptq.check_symmetric(module, self._source.tensor(f"{module}.qzeros"), scheme)
            bias = self._source.find(f"{module}.bias")
            if bias is not None and f"{module}.bias" not in self._biases and bias.any():
                raise CheckpointError(
                    f"{module}.bias is not zero, but by config.json this module has none"
                )

    def _check_shape(self, module: str, scheme: Scheme) -> None:
        told = self._source.tensor(f"{module}.weight_shape").tolist()
        num_outputs, num_words = self._source.tensor(f"{module}.weight_packed").shape
        num_inputs = num_words * 32 // scheme.bits
        if told != [num_outputs, num_inputs]:
            raise CheckpointError(
                f"{module}.weight_shape is {told}, the matrix [{num_outputs}, {num_inputs}]"
            )

    def _made(self, recipe: Recipe, parts: list[Tensor]) -> Tensor:
        if recipe.layout.endswith(PAIRED):
            gate, up = (part.to(self._dtype) for part in parts)
            return self._copied(pack_paired(gate, up, recipe.layout.removesuffix(PAIRED)))
        if len(parts) == 1 and recipe.layout == PLAIN:
            tensor = parts[0].to(self._device, self._dtype)
            return self._mapped(tensor) if tensor is parts[0] else self._copied(tensor)
        stack = self._stacked(parts)
        return self._copied(stack if recipe.layout == PLAIN else pack(stack, recipe.layout))

    def _stacked(self, parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0].to(self._device, self._dtype)
        rows = [part.shape[0] for part in parts]
        shape = (sum(rows), *parts[0].shape[1:])
        whole = torch.empty(shape, dtype=self._dtype, device=self._device)
        for part, space in zip(parts, whole.split(rows), strict=True):
            space.copy_(part)
        return whole

    def _copied(self, tensor: Tensor) -> Tensor:
        self._num_copied_bytes += tensor.nbytes
        self._num_copied_tensors += 1
        return tensor

    def _mapped(self, tensor: Tensor) -> Tensor:
        self._num_mapped_bytes += tensor.nbytes
        return tensor


def assemble(config: ModelConfig, layout: str, get: Callable[[Recipe], Tensor]) -> ModelWeights:
    """Puts the tensors of all recipes into their places."""
    found = {recipe.name: (recipe, get(recipe)) for recipe in recipes(config, layout)}

    def vector(name: str) -> Tensor | None:
        return found[name][1] if name in found else None

    def present(name: str) -> Tensor:
        return found[name][1]

    def matrix(name: str) -> Matrix:
        recipe, data = found[name]
        return Matrix(data, recipe.layout, *recipe.shape)

    def integers(name: str) -> QuantizedMatrix:
        recipe, words = found[f"{name}.words"]
        assert recipe.scheme is not None
        tensors = words, present(f"{name}.scales"), vector(f"{name}.zeros"), vector(f"{name}.order")
        return QuantizedMatrix(*tensors, recipe.scheme, *recipe.shape)

    def linear(name: str) -> Linear:
        is_quantized = f"{name}.words" in found
        weight = integers(name) if is_quantized else matrix(f"{name}.weight")
        return Linear(weight, vector(f"{name}.bias"))

    def linears(name: str, num: int) -> Linears:
        if {f"{name}.words", f"{name}.weight"} & found.keys():
            return linear(name)
        return tuple(linear(f"{name}.{i}") for i in range(num))

    def layer(index: int) -> LayerWeights:
        at = f"layers.{index}."
        return LayerWeights(
            input_norm=present(f"{at}input_norm"),
            qkv=linears(f"{at}qkv", 3),
            q_norm=vector(f"{at}q_norm"),
            k_norm=vector(f"{at}k_norm"),
            o=linear(f"{at}o"),
            post_norm=present(f"{at}post_norm"),
            gate_up=linears(f"{at}gate_up", 2),
            down=linear(f"{at}down"),
        )

    layers = [layer(index) for index in range(config.num_layers)]
    embedding = matrix("embedding")
    head: Matrix | QuantizedMatrix = embedding
    if "head.words" in found:
        head = integers("head")
    elif not config.is_tied:
        head = matrix("head")
    return ModelWeights(embedding, layers, present("norm"), head)
