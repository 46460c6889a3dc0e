"""Where and in which dtype a model will run, decided before torch is imported.

Knows the native library's instruction set and whether there is a CUDA driver; the worker checks the
decision against torch when it is there.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.cpu import native
from ..kernels.layout_names import PANEL16, PANEL16_INT12, PLAIN
from .config import EngineConfig
from .lean_torch import has_cuda_driver

HALVES = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Target:
    """device: cpu or cuda; dtype: of weights and cache; layout: of packed linear weights."""

    device: str
    dtype: str
    layout: str

    @property
    def name(self) -> str:
        """Artefacts of equal names can be exchanged."""
        return f"{self.device}-{self.dtype}-{self.layout}"


def choose_target(config: EngineConfig, checkpoint_dtype: str, level: str | None = None) -> Target:
    """`auto` is CUDA where there is a driver, else the CPU; the dtype is the checkpoint's own.

    On a CPU bfloat16 is multiplied by the native kernels at every level but the generic one, and
    stands in for float16; without them float32 is the faster one. `level` is the instruction set
    of the machine that it is for, None for this one.
    """
    level = level or native.level()
    device = _device(config.device)
    dtype = config.dtype if config.dtype != "auto" else _dtype(device, checkpoint_dtype, level)
    return Target(device, dtype, _layout(device, dtype, level))


def _layout(device: str, dtype: str, level: str | None) -> str:
    """Panels where the native kernels read them; at their generic level torch is faster."""
    if not (device == "cpu" and dtype in ("bfloat16", "float32") and _has_native_kernels(level)):
        return PLAIN
    # The one level that multiplies pairs of integers at a higher rate than floats, and no bfloat16.
    return PANEL16_INT12 if level == "avx2" and dtype == "bfloat16" else PANEL16


def _device(asked: str) -> str:
    if asked != "auto":
        return asked
    return "cuda" if has_cuda_driver() else "cpu"


def _dtype(device: str, checkpoint_dtype: str, level: str | None) -> str:
    if device == "cuda":
        return checkpoint_dtype if checkpoint_dtype in HALVES else "bfloat16"
    is_half = checkpoint_dtype in HALVES
    return "bfloat16" if is_half and _has_native_kernels(level) else "float32"


def _has_native_kernels(level: str | None) -> bool:
    return level not in (None, "generic")
