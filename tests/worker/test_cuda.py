"""The same engine on a CUDA device: its greedy tokens are those of the CPU, in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pilotlight.bench.make_model import SHAPES, write_model
from pilotlight.engine.boot import boot
from pilotlight.engine.boot_report import Unheard
from pilotlight.engine.config import EngineConfig
from pilotlight.engine.messages import Submit
from pilotlight.engine.models.artefact import build
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.weights_cache.store import Store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
TINY = sorted(name for name in SHAPES if name.startswith("tiny-"))


def _greedy(folder: Path, device: str) -> dict[str, list[int]]:
    config = EngineConfig(
        model=str(folder),
        device=device,
        dtype="float32",
        kv_cache_bytes=8 << 20,
        max_num_seqs=4,
        max_batched_tokens=16,
        max_model_len=200,
    )
    booted = boot(config, Unheard(), lambda: None)
    core, facts = booted.core, booted.facts
    assert facts.device.startswith(device)
    sampling = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    for i, length in enumerate((1, 7, 40)):
        core.submit(Submit(f"r{i}", [(3 * j + i) % 50 for j in range(length)], sampling))
    tokens: dict[str, list[int]] = {}
    while core.has_work:
        record = core.step()
        for output in record.outputs if record else ():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


@pytest.mark.parametrize("shape", TINY)
def test_tokens_are_those_of_the_cpu(shape: str, tmp_path: Path) -> None:
    write_model(shape, tmp_path, dtype="float32")
    assert _greedy(tmp_path, "cuda") == _greedy(tmp_path, "cpu")


@pytest.mark.parametrize("name", TINY[:2])
def test_an_artefact_goes_to_the_device_through_the_ring(name: str, tmp_path: Path) -> None:
    folder = write_model(name, tmp_path / "model", dtype="float32")
    build(Store(tmp_path / "cache"), folder, "cuda", "float32")
    config = EngineConfig(
        model=str(folder), device="cuda", dtype="float32", kv_cache_bytes=8 << 20,
        max_num_seqs=4, max_batched_tokens=16, max_model_len=200, cache=str(tmp_path / "cache"),
    )  # fmt: skip
    booted = boot(config, Unheard(), lambda: None)
    assert booted.facts.weights.copied_bytes == booted.facts.weights.verified_bytes > 0
    assert booted.facts.artefact == "artefact"
    booted.close()
