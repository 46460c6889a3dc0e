"""Native calls that run again: on what the inputs hold then, and only if nothing else computed."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
from pilotlight.kernels.cpu import native
from pilotlight.kernels.cpu.packed_embedding import packed_embedding
from pilotlight.kernels.cpu.recording import CALLS_PER_PULSE, MemoryPool, record
from pilotlight.kernels.cpu.rms_norm import rms_norm
from pilotlight.kernels.cpu.silu_mul import silu_mul
from pilotlight.kernels.layouts import pack
from torch import Tensor

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(native.library() is None, reason=native.missing_reason() or ""),
]

WEIGHT = torch.linspace(0.5, 1.5, 32)
X = torch.linspace(-1.0, 1.0, 192).view(3, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recording_follows_its_inputs(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 64).to(dtype), WEIGHT.to(dtype)
    (first,), recording = record(lambda: (rms_norm(silu_mul(x), weight, 1e-6),), MemoryPool())
    assert recording is not None
    assert first.equal(rms_norm(silu_mul(x), weight, 1e-6))
    x.copy_(torch.randn(3, 64))
    assert recording.run(lambda: None)[0].equal(rms_norm(silu_mul(x), weight, 1e-6))
    assert recording.run(lambda: None)[0] is first, "the result is where it was"


def test_recordings_leave_their_results_to_each_other() -> None:
    """One runs at a time: memory for all results at once would be that of all batch sizes."""
    pool, inputs = MemoryPool(), [torch.randn(n, 64) for n in (3, 4, 2)]
    recorded = [record(lambda x=x: (silu_mul(x),), pool) for x in inputs]
    assert len(pool._chunks) == 2, "the third fits where the first was, or the second"
    for x, (_, recording) in zip(inputs, recorded, strict=True):
        assert recording is not None
        assert recording.run(lambda: None)[0].equal(silu_mul(x))


def test_nothing_at_all_is_recorded_too() -> None:
    none, recording = record(lambda: (silu_mul(torch.empty(0, 64)), silu_mul(X)), MemoryPool())
    assert recording is not None
    assert none[0].shape == (0, 32)
    assert recording.run(lambda: None)[1].equal(silu_mul(X))


def test_what_torch_computes_cannot_be_recorded() -> None:
    x = torch.randn(3, 64)
    (result,), recording = record(lambda: (silu_mul(x) + 1,), MemoryPool())
    assert recording is None
    assert result.equal(silu_mul(x) + 1)
    assert record(lambda: (x[:2].view(64, 2),), MemoryPool())[1] is None, "there is nothing to run"


def test_a_long_run_shows_life() -> None:
    x, pulses = torch.randn(3, 64), []

    def many() -> tuple[Tensor]:
        for _ in range(2 * CALLS_PER_PULSE):
            y = silu_mul(x)
        return (silu_mul(x).view(y.shape),)

    _, recording = record(many, MemoryPool())
    assert recording is not None
    assert recording.run(lambda: pulses.append(1))[0].equal(silu_mul(x))
    assert len(pulses) == 3


def test_nothing_is_recorded_afterwards_nor_after_an_error() -> None:
    x = torch.randn(3, 64)
    with pytest.raises(ZeroDivisionError), native.recording() as calls:
        silu_mul(x)
        raise ZeroDivisionError
    silu_mul(x)
    assert [op for op, _, _ in calls] == ["silu_mul"]


def test_an_error_in_a_recorded_call_is_raised() -> None:
    table = pack(torch.randn(32, 8))
    ids = torch.zeros(2, dtype=torch.int32)
    _, recording = record(lambda: (packed_embedding(ids, table, 32, 8),), MemoryPool())
    assert recording is not None
    ids[1] = 99
    with pytest.raises(IndexError):
        recording.run(lambda: None)


LEAN = """
from pilotlight.engine.lean_torch import import_lean
import_lean()
import sys
import torch
from pilotlight.kernels.cpu.recording import MemoryPool, record
from pilotlight.kernels.cpu.silu_mul import silu_mul
before = set(sys.modules)
with torch.inference_mode():
    _, recording = record(lambda: (silu_mul(torch.ones(3, 64)).view(32, 3),), MemoryPool())
print(recording is None, set(sys.modules) - before)
"""


def test_recording_imports_none_of_torchs_compilers() -> None:
    """An engine has left them out; torch.ones is a computation, so there is no recording."""
    command = (sys.executable, "-c", LEAN)
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "True set()"


# ---- memory ----------------------------------------------------------------------------------


def take(pool: MemoryPool, num_elements: int) -> Tensor:
    return pool.tensor(torch.Size((num_elements,)), torch.float32)


def test_memory_is_used_again_when_its_last_view_is_gone() -> None:
    pool = MemoryPool()
    first = take(pool, 64)
    address, view = first.data_ptr(), first.view(8, 8)[2:]
    del first
    second = take(pool, 64)
    assert second.data_ptr() != address, "a view of it lives"
    del view
    assert take(pool, 64).data_ptr() == address


def test_a_chain_needs_no_more_memory_than_its_widest_place() -> None:
    pool, x = MemoryPool(), torch.randn(4, 64)

    def deep() -> Tensor:
        y = silu_mul(x)
        for _ in range(50):
            y = rms_norm(y, WEIGHT, 1e-6)
        return y

    _, recording = record(deep, pool)
    assert recording is not None
    del recording
    gc.collect()
    addresses = {tensor.data_ptr() for tensor in [take(pool, 128) for _ in range(4)]}
    assert len(addresses) == 4
    assert len(pool._free) == 4, "fifty results took two places"


def test_small_tensors_fit_into_large_chunks() -> None:
    pool = MemoryPool()
    address = take(pool, 100).data_ptr()
    assert take(pool, 10).data_ptr() == address
    assert address % 64 == 0
