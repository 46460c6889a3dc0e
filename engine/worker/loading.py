"""The model's weights: views of a mapped artefact, prepared from a checkpoint, or on their way to a
device while everything else is made ready.

Knows files, arenas and who reads them; knows no kernels and no cache.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from ...weights_cache.artefacts import LeasedArena
from ...weights_cache.stream.mapped import MappedArena, MappedWeights
from ..boot_report import BootReport
from ..errors import BadArtefact
from ..found_weights import FoundWeights
from ..messages import WeightsFacts
from ..models.names import expected_tensors
from ..models.weights import ModelWeights, Preparer, assemble

if TYPE_CHECKING:
    from ...weights_cache.stream.device import DeviceArena


class Loading(Protocol):
    @property
    def weights(self) -> ModelWeights:
        """Where they will be for good; their values are there when `finish` returns."""
        ...

    def finish(self, report: BootReport) -> WeightsFacts:
        """Raises BadArtefact."""
        ...

    def abandon(self) -> None:
        """Nothing is read or written any more."""
        ...


@dataclass(frozen=True, slots=True)
class Loaded:
    weights: ModelWeights
    facts: WeightsFacts

    def finish(self, report: BootReport) -> WeightsFacts:
        return self.facts

    def abandon(self) -> None:
        pass


class Copied:
    """An artefact that a ring of slots brings to the device, from now on, beside the caller."""

    def __init__(self, found: FoundWeights, leased: LeasedArena, arena: DeviceArena) -> None:
        self._found = found
        self._leased = leased
        self._arena = arena
        self.weights = assemble(
            found.model, found.target.layout, lambda recipe: arena.tensor(recipe.name)
        )

    def finish(self, report: BootReport) -> WeightsFacts:
        found, total = self._found, self._found.num_bytes
        report("await_weights", 0, total, found.origin)
        try:
            self._arena.finish(lambda done: report("await_weights", done, total, found.origin))
        except BadArtefact:
            self._leased.condemn()
            raise
        return WeightsFacts(
            "artefact",
            copied_bytes=total,
            verified_bytes=total if found.verify != "off" else 0,
            copy_bytes_per_s=total / self._arena.copied_s,
        )

    def abandon(self) -> None:
        self._arena.abandon()


def begin_loading(
    found: FoundWeights, device: torch.device, dtype: torch.dtype, report: BootReport
) -> Loading:
    report("load_weights", 0, found.num_bytes, found.origin)
    if found.leased is not None and found.reader is not None:
        return _copying(found, found.leased, device)
    loaded = _mapped(found) if found.leased is not None else _prepared(found, device, dtype, report)
    report("load_weights", found.num_bytes, found.num_bytes, found.origin)
    return loaded


def _copying(found: FoundWeights, leased: LeasedArena, device: torch.device) -> Copied:
    from ...weights_cache.stream.copiers import copier_for
    from ...weights_cache.stream.device import DeviceArena

    assert found.reader is not None
    is_verified = found.verify != "off"
    arena = DeviceArena(leased.arena, found.reader, copier_for(device), verifies=is_verified)
    return Copied(found, leased, arena)


def _mapped(found: FoundWeights) -> Loaded:
    assert found.leased is not None
    mapped = MappedArena(found.leased.arena)
    layout = found.target.layout
    weights = assemble(found.model, layout, lambda recipe: mapped.tensor(recipe.name))
    return Loaded(weights, WeightsFacts("artefact", mapped_bytes=found.num_bytes))


def _prepared(
    found: FoundWeights, device: torch.device, dtype: torch.dtype, report: BootReport
) -> Loaded:
    began_s = time.monotonic()
    prepared = Preparer(
        MappedWeights(found.manifest),
        device,
        dtype,
        lambda done: report("load_weights", done, found.num_bytes, found.origin),
        biases=expected_tensors(found.model),
    )
    weights = assemble(found.model, found.target.layout, prepared)
    return Loaded(weights, prepared.facts(time.monotonic() - began_s))
