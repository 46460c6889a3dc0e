"""Recorded steps against the same steps computed call by call."""

from __future__ import annotations

import pytest
from pilotlight.engine.core import EngineCore
from pilotlight.engine.worker import recorded
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
    assert {(n, n, n) for n in (1, 2, 4)} <= set(recordings), "of decodes alone"
    beside = [shape for shape in recordings if shape[0] > shape[1] > shape[2] > 0]
    assert beside, "of decodes and a part of a prompt"
    assert None not in recordings.values()
    monkeypatch.setattr(recorded, "MAX_RECORDED_TOKENS", 0)
    plain = booted(dtype)
    assert twice == [engine_tokens(plain, PROMPTS, 20)] * 2
    assert recordings_of(plain) == {}


@pytest.mark.skipif(native.library() is None, reason=native.missing_reason() or "")
def test_parts_of_a_prompt_alone_are_recorded_when_they_come_again() -> None:
    core, prompt = booted("float32"), prompt_of(90, seed=3)
    tokens = [engine_tokens(core, [prompt], 2)]
    assert recordings_of(core)[16, 1, 0] is not None
    # Its last part is sampled after, at its end: that is computed call by call.
    assert {shape for shape in recordings_of(core) if shape[0] > 1} == {(16, 1, 0)}
    core._runner._decodes._recordings.clear()
    assert engine_tokens(core, [[5, *prompt]], 1) != tokens, "another one"
    assert engine_tokens(core, [prompt], 2) == tokens[0]


def test_what_has_no_native_kernels_runs_without_recordings() -> None:
    core = booted("float16")
    assert [len(tokens) for tokens in engine_tokens(core, PROMPTS, 3)] == [3] * 4
    assert set(recordings_of(core).values()) == {None}


@pytest.mark.skipif(native.library() is None, reason=native.missing_reason() or "")
def test_the_oldest_recordings_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "MAX_RECORDINGS", 2)
    core = booted("float32")
    twice = [engine_tokens(core, PROMPTS, 8) for _ in range(2)]
    assert len(recordings_of(core)) == 2
    assert twice == [engine_tokens(booted("float32"), PROMPTS, 8)] * 2
