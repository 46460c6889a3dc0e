"""What there is to load a model from. Decided from headers and names, before torch is there.

Knows files; knows no tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..weights_cache.manifest import Manifest, read_manifest
from .config import EngineConfig
from .models.config import ModelConfig, read_model_config
from .models.names import check_tensors
from .target import Target, choose_target

Report = Callable[[str, int, int, str], None]


@dataclass(slots=True)
class FoundWeights:
    """`origin` says where the weights come from."""

    model: ModelConfig
    manifest: Manifest
    target: Target
    origin: str

    @property
    def num_bytes(self) -> int:
        return self.manifest.num_bytes

    def start_moving(self) -> None:
        """Asks the system to read ahead; it goes on by itself."""
        for file in weight_files(self.manifest):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def find_weights(config: EngineConfig) -> FoundWeights:
    """Raises CheckpointError or UnsupportedModel."""
    folder = Path(config.model)
    model, manifest = read_model_config(folder), read_manifest(folder)
    check_tensors(model, manifest)
    target = choose_target(config, model.checkpoint_dtype)
    return FoundWeights(model, manifest, target, "checkpoint")


def weight_files(manifest: Manifest) -> list[Path]:
    return sorted({span.file for span in manifest.tensors.values()})
