"""Recorded decode steps against the same steps computed call by call."""

from __future__ import annotations

import pytest
from pilotlight.engine.core import EngineCore
from pilotlight.engine.worker import decodes
from pilotlight.kernels.cpu import native
from pilotlight.server.config import DEMO_MODEL
from pilotlight.tests.models.checkpoints import cpu_engine, engine_tokens, prompt_of

PROMPTS = [prompt_of(length, seed=length) for length in (1, 5, 20, 33)]


def booted(dtype: str) -> EngineCore:
    return cpu_engine(DEMO_MODEL, dtype=dtype, speculative="off", max_model_len=100)


def recordings_of(core: EngineCore) -> dict:
    return core._runner._decodes._recordings


@pytest.mark.skipif(native.library() is None, reason=native.missing_reason() or "")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_steps_bring_the_same_tokens(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    core = booted(dtype)
    twice = [engine_tokens(core, PROMPTS, 20) for _ in range(2)]
    recordings = recordings_of(core)
    assert {1, 2, 4} <= set(recordings)
    assert None not in recordings.values()
    monkeypatch.setattr(decodes, "MAX_RECORDED_TOKENS", 0)
    plain = booted(dtype)
    assert twice == [engine_tokens(plain, PROMPTS, 20)] * 2
    assert recordings_of(plain) == {}


def test_what_has_no_native_kernels_runs_without_recordings() -> None:
    core = booted("float16")
    assert [len(tokens) for tokens in engine_tokens(core, PROMPTS, 3)] == [3] * 4
    assert set(recordings_of(core).values()) == {None}
