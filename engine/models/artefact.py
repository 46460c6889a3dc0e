"""Writes a model's artefact: every prepared tensor, one after the other, into the store.

One tensor is in memory at a time, whatever the model's size. Knows recipes, the store and torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.layout_names import PAIRED, PANEL16_INT12, PLAIN, quantized_shapes, stored_shape
from ...weights_cache.arena import TensorSpec
from ...weights_cache.arena_writer import ArenaWriter
from ...weights_cache.store import Store
from ...weights_cache.stream.mapped import MappedWeights
from ..config import EngineConfig
from ..found_weights import FoundWeights, find_weights, key_of, weight_files
from .names import expected_tensors
from .quantization import Scheme
from .recipes import Recipe, recipes
from .weights import Preparer

DTYPES = {
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
    "float32": (torch.float32, "F32"),
}
"""By our names: torch's dtype and safetensors' name."""

OnBytes = Callable[[str, int, int], None]
"""What is done ("hash" or "build"), bytes done, bytes in all."""


@dataclass(frozen=True, slots=True)
class Built:
    key: str
    path: Path
    num_bytes: int


def build(
    store: Store,
    folder: Path,
    device: str = "auto",
    dtype: str = "auto",
    head_dtype: str = "auto",
    on_bytes: OnBytes = lambda what, done, total: None,
    level: str | None = None,
) -> Built:
    """Builds the artefact, or finds that it is there. Raises SetupError.

    `level`: the instruction set of the machines that will read it, None for this one's.
    """
    asked = EngineConfig(model=str(folder), device=device, dtype=dtype, head_dtype=head_dtype)
    found = find_weights(asked, folder, level)
    key = key_of(_digests(store, found, on_bytes), folder, found.model, found.target)
    specs = [_spec(recipe, found.target.dtype) for recipe in _recipes(found)]
    about = {"architecture": found.model.architecture, "source": str(folder.resolve())}
    total = sum(spec.num_bytes for spec in specs)

    def write(writer: ArenaWriter) -> None:
        _write(writer, found, lambda: on_bytes("build", writer.num_bytes_done, writer.num_bytes))

    path = store.publish_arena(key, write, specs, {**about, "target": found.target.name})
    return Built(key, path, total)


def _recipes(found: FoundWeights) -> list[Recipe]:
    return recipes(found.model, found.target.layout)


def _digests(store: Store, found: FoundWeights, on_bytes: OnBytes) -> dict[str, str]:
    """Of each weight file: remembered, or hashed now."""
    total = found.manifest.num_bytes
    digests: dict[str, str] = {}
    before = 0
    for file in weight_files(found.manifest):
        digests[file.name] = store.sha256_of(file, partial(_after, on_bytes, before, total))
        before += file.stat().st_size
    return digests


def _after(on_bytes: OnBytes, before: int, total: int, num_bytes: int) -> None:
    on_bytes("hash", before + num_bytes, total)


def _spec(recipe: Recipe, dtype: str) -> TensorSpec:
    if recipe.scheme is not None:
        return _integers_spec(recipe, recipe.scheme)
    torch_dtype, name = DTYPES[dtype]
    shape = recipe.shape
    if recipe.layout != PLAIN:
        rows, columns = recipe.shape
        shape = stored_shape(recipe.layout, rows, columns, torch_dtype.itemsize)
    if recipe.layout.removesuffix(PAIRED) == PANEL16_INT12:
        name = "I16"
    num_bytes = torch.Size(shape).numel() * torch_dtype.itemsize
    return TensorSpec(recipe.name, name, shape, recipe.layout, recipe.section, num_bytes)


def _integers_spec(recipe: Recipe, scheme: Scheme) -> TensorSpec:
    """Of a quantised matrix: words and order are int32, scales and zero points fp32."""
    rows, columns = recipe.shape
    words, groups = quantized_shapes(scheme.bits, scheme.group_len(columns), rows, columns)
    shape = {"words": words, "order": (columns,)}.get(recipe.role, groups)
    name = "I32" if recipe.role in ("words", "order") else "F32"
    num_bytes = 4 * torch.Size(shape).numel()
    return TensorSpec(recipe.name, name, shape, recipe.layout, recipe.section, num_bytes)


def _write(writer: ArenaWriter, found: FoundWeights, report: Callable[[], None]) -> None:
    prepare = Preparer(
        MappedWeights(found.manifest),
        torch.device("cpu"),
        DTYPES[found.target.dtype][0],
        biases=expected_tensors(found.model),
    )
    with torch.inference_mode():
        for recipe in _recipes(found):
            if not writer.is_written(recipe.name):
                writer.write(recipe.name, _bytes_of(prepare(recipe)))
            report()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
