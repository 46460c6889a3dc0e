"""A model from its artefact is the model from its checkpoint; a damaged one is not used."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pilotlight.bench.make_model import write_model
from pilotlight.engine.boot import Booted, boot
from pilotlight.engine.boot_report import Unheard
from pilotlight.engine.config import EngineConfig
from pilotlight.engine.found_weights import FoundWeights, fill_ring, find_weights
from pilotlight.engine.models import artefact
from pilotlight.kernels.cpu import native
from pilotlight.tests.models.checkpoints import engine_tokens, prompt_of
from pilotlight.weights_cache.store import Store
from torch import Tensor

NUM_NEW_TOKENS = 12
SHAPES = ("tiny-llama", "tiny-qwen2", "tiny-qwen3")

needs_native = pytest.mark.skipif(
    native.library() is None, reason=native.missing_reason() or "the library is there"
)


@dataclass(frozen=True)
class Cached:
    folder: Path
    cache: Path

    def boot(self, cache: bool = True, verify: str = "full") -> Booted:
        config = EngineConfig(
            model=str(self.folder),
            dtype="bfloat16",
            max_num_seqs=4,
            max_batched_tokens=64,
            kv_cache_bytes=1 << 22,
            cache=str(self.cache) if cache else "",
            verify=verify,
        )
        return boot(config, Unheard(), lambda: None)

    def tokens(self, booted: Booted) -> list[list[int]]:
        prompts = [prompt_of(length, seed=length) for length in (1, 17, 40)]
        return engine_tokens(booted.core, prompts, NUM_NEW_TOKENS)

    def build(self, level: str | None = None) -> artefact.Built:
        built = artefact.build(Store(self.cache), self.folder, "cpu", "bfloat16", level=level)
        # A digest of a file that was just written is not believed: this one was written long ago.
        for record in (self.cache / "digests").iterdir():
            later_s = record.stat().st_mtime + 10
            os.utime(record, (later_s, later_s))
        return built

    def origin(self) -> str:
        booted = self.boot()
        booted.weights.close()
        return booted.facts.artefact


@pytest.fixture(params=SHAPES)
def cached(request: pytest.FixtureRequest, tmp_path: Path) -> Cached:
    folder = write_model(request.param, tmp_path / "model")
    return Cached(folder, tmp_path / "cache")


def test_without_an_artefact_the_checkpoint_is_loaded(cached: Cached) -> None:
    assert cached.origin() == "checkpoint (no artefact yet)"


def test_both_give_equal_tokens(cached: Cached) -> None:
    wanted = cached.tokens(cached.boot(cache=False))
    cached.build()
    booted = cached.boot()
    assert booted.facts.artefact == "artefact"
    assert cached.tokens(booted) == wanted
    booted.weights.close()


@needs_native
def test_one_can_be_built_for_machines_of_another_instruction_set(
    cached: Cached, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = "avx512" if native.level() == "avx2" else "avx2"
    here, other = cached.build(), cached.build(there)
    assert here.key != other.key
    assert cached.build().key == here.key
    monkeypatch.setattr(native, "level", lambda: there)
    config = EngineConfig(
        model=str(cached.folder), device="cpu", dtype="bfloat16", cache=str(cached.cache)
    )
    found = find_weights(config, cached.folder)
    assert (found.key, found.origin) == (other.key, "artefact")
    found.close()


def test_both_give_logits_of_equal_bits(cached: Cached) -> None:
    first = _logits(cached, cached.boot())
    cached.build()
    booted = cached.boot()
    assert booted.facts.artefact == "artefact"
    second = _logits(cached, booted)
    booted.close()
    assert len(first) == len(second) >= NUM_NEW_TOKENS
    assert all(
        torch.equal(a.view(torch.int32), b.view(torch.int32))
        for a, b in zip(first, second, strict=True)
    )


def _logits(cached: Cached, booted: Booted) -> list[Tensor]:
    """Of every token that was chosen, in the order of steps."""
    seen: list[Tensor] = []
    decodes = booted.core._runner._decodes
    run = decodes.run

    def noted(inputs: Any) -> Any:
        logits, best = run(inputs)
        if len(logits):
            seen.append(logits.float().clone())
        return logits, best

    decodes.run = noted
    cached.tokens(booted)
    return seen


@pytest.fixture
def through_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a device that is not the processor."""

    def start_moving(found: FoundWeights) -> None:
        found.reader = fill_ring(found.leased.arena) if found.leased else None

    monkeypatch.setattr(FoundWeights, "start_moving", start_moving)


@pytest.mark.usefixtures("through_a_ring")
def test_copied_through_a_ring_it_is_the_same_model(cached: Cached) -> None:
    wanted = cached.tokens(cached.boot(cache=False))
    cached.build()
    booted = cached.boot()
    weights = booted.facts.weights
    assert (weights.source, weights.mapped_bytes) == ("artefact", 0)
    assert weights.copied_bytes == weights.verified_bytes == booted.weights.num_bytes
    assert cached.tokens(booted) == wanted
    booted.close()


@pytest.mark.usefixtures("through_a_ring")
def test_damage_is_found_in_the_ring_and_the_checkpoint_serves(cached: Cached) -> None:
    path = cached.build().path
    data = bytearray(path.read_bytes())
    data[-(len(data) // 4)] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    booted = cached.boot()
    assert booted.facts.artefact == "checkpoint (no artefact yet)"
    booted.close()
    assert Store(cached.cache).arenas() == []


def test_building_again_finds_it(cached: Cached) -> None:
    first, second = cached.build(), cached.build()
    assert first == second
    assert len(Store(cached.cache).arenas()) == 1


def test_a_changed_checkpoint_is_a_miss(cached: Cached) -> None:
    cached.build()
    assert cached.origin() == "artefact"
    config = cached.folder / "config.json"
    config.write_text(config.read_text() + "\n")
    assert cached.origin() == "checkpoint (no artefact yet)"


def test_a_damaged_artefact_is_found_out_and_the_checkpoint_serves(cached: Cached) -> None:
    wanted = cached.tokens(cached.boot(cache=False))
    path = cached.build().path
    assert cached.origin() == "artefact"
    data = bytearray(path.read_bytes())
    data[-(len(data) // 4)] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    booted = cached.boot()
    assert booted.facts.artefact == "checkpoint (no artefact yet)"
    assert cached.tokens(booted) == wanted
    booted.weights.close()
