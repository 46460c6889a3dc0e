"""What there is to load a model from: its checkpoint, and perhaps its artefact in the cache.

Decided from headers and names, before torch is there. Holds the artefact's lease and verification
for as long as the engine uses it. Knows files, hashes and the store; knows no tensors.

    artefact known   mapped, leased, verified while torch is imported
    not known        the checkpoint's own bytes; the artefact is written behind READY
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..kernels.layout_names import LAYOUT_VERSION
from ..weights_cache.arena import Arena
from ..weights_cache.artefacts import LeasedArena
from ..weights_cache.keys import artefact_key
from ..weights_cache.manifest import Manifest, read_manifest
from ..weights_cache.store import Store
from ..weights_cache.verify import Verification
from .config import EngineConfig
from .host_memory import available_host_bytes
from .models.config import ModelConfig, read_model_config
from .models.names import check_tensors, find_quantized
from .target import Target, choose_target

if TYPE_CHECKING:
    from ..weights_cache.reader.readers import Reader

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class FoundWeights:
    """`leased` is None when the checkpoint itself is read; `origin` says which, and why."""

    folder: Path
    model: ModelConfig
    manifest: Manifest
    target: Target
    origin: str
    leased: LeasedArena | None = None
    store: Store | None = None
    """Where `leased` is, by the name of `key`."""
    key: str = ""
    verify: str = "off"
    verification: Verification | None = None
    reader: Reader | None = None
    """Of an artefact that goes to a device: at work from `start_moving` on."""

    @property
    def num_bytes(self) -> int:
        return self.leased.arena.num_bytes if self.leased else self.manifest.num_bytes

    def start_moving(self) -> None:
        """Brings the bytes in from storage, and hashes them as they come if asked to."""
        if self.leased is not None and self.target.device != "cpu":
            self.reader = fill_ring(self.leased.arena)
        elif self.leased is None or self.verify == "off":
            will_need([self.leased.path] if self.leased else weight_files(self.manifest))
        else:
            self.verification = self.leased.verification(on_failure=_told).start()

    def finish_verifying(self) -> None:
        """Raises BadArtefact. With `full`, every byte was hashed when this returns."""
        if self.verification is not None and self.verify == "full":
            self.verification.wait()

    def check(self) -> None:
        """Raises BadArtefact when a chunk hashed behind READY is not what was written."""
        if self.verification is not None and self.verification.is_done:
            self.verification.wait()
            self.verification = None

    def close(self) -> None:
        if self.verification is not None:
            self.verification.stop()
        if self.reader is not None:
            self.reader.close()
        if self.leased is not None:
            self.leased.close()


def _told(error: Exception) -> None:
    logger.error("%s", error)


def find_weights(config: EngineConfig, folder: Path, level: str | None = None) -> FoundWeights:
    """Raises CheckpointError or UnsupportedModel: the checkpoint is looked at in any case.

    `level`: as choose_target takes it.
    """
    manifest = read_manifest(folder)
    model = find_quantized(read_model_config(folder), manifest)
    check_tensors(model, manifest)
    model = replace(model, rounds_head=config.head_dtype == "int8")
    target = choose_target(config, model.checkpoint_dtype, level)
    if not config.cache:
        return FoundWeights(folder, model, manifest, target, "checkpoint (no cache)")
    store = Store(Path(config.cache))
    key = known_key(store, folder, model, manifest, target)
    leased = store.find_arena(key) if key else None
    found = FoundWeights(folder, model, manifest, target, "checkpoint (no artefact yet)")
    if key and leased:
        found.origin, found.leased, found.verify = "artefact", leased, config.verify
        found.store, found.key = store, key
    return found


def known_key(
    store: Store, folder: Path, model: ModelConfig, manifest: Manifest, target: Target
) -> str | None:
    """The artefact's name, if every file of the checkpoint was hashed before."""
    digests: dict[str, str] = {}
    for file in weight_files(manifest):
        digest = store.digest_of(file)
        if digest is None:
            return None
        digests[file.name] = digest
    return key_of(digests, folder, model, target)


def key_of(digests: dict[str, str], folder: Path, model: ModelConfig, target: Target) -> str:
    return artefact_key(
        digests,
        config_digest=hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        dtype=target.dtype,
        quantisation=str(model.quantization or "none") + ("; int8 head" * model.rounds_head),
        layout_version=LAYOUT_VERSION,
        target=target.name,
    )


def weight_files(manifest: Manifest) -> list[Path]:
    return sorted({span.file for span in manifest.tensors.values()})


def fill_ring(arena: Arena) -> Reader:
    """Reads as much as may be in memory at once, before there is a device that takes it."""
    from ..weights_cache.reader.direct import reads_direct
    from ..weights_cache.reader.readers import start_reader
    from ..weights_cache.reader.ring import Ring, num_slots

    chunk_bytes = arena.header.chunk_bytes
    slots = num_slots(arena.num_bytes, chunk_bytes, available_host_bytes())
    return start_reader(arena, Ring(slots, chunk_bytes), reads_direct(arena))


def will_need(files: list[Path]) -> None:
    """Asks the system to read ahead; it goes on by itself."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
