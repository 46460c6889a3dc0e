"""The stress run: clean where the engine is, and not blind to what it looks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pilotlight.bench import stress
from pilotlight.bench.make_model import write_model
from pilotlight.engine.core import EngineCore

SETTINGS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_threads": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("tiny-llama-gqa", tmp_path_factory.mktemp("model"), dtype="float32")


def test_a_clean_run(model: Path) -> None:
    found = stress.mixed(model, 60, seed=3, **SETTINGS)
    assert found["wrong"] == []
    assert found["num_aborted"] > 3
    assert found["num_preemptions"] > 0, "memory was never short"
    assert found["num_tokens"] > 300


def test_aborts_that_do_nothing_are_seen(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[str] = []
    monkeypatch.setattr(EngineCore, "abort", lambda self, names, index=None: lost.extend(names))
    run = stress._Mixed(stress._core(model, max_num_seqs=8, **SETTINGS), seed=3)
    run.until_over(30)
    assert set(lost) == run.aborted
    assert any("went on after it was aborted" in wrong for wrong in run.wrong)


def test_requests_that_never_end_are_named(model: Path) -> None:
    run = stress._Mixed(stress._core(model, max_num_seqs=8, **SETTINGS), seed=3)
    run.until_over(3)
    assert list(run.unended(5)) == ["r3 never ended", "r4 never ended"]


def test_company_changes_nothing_and_would_be_seen(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stress.different_in_company(model, num_others=6, **SETTINGS) == []
    answers = iter(range(100))
    monkeypatch.setattr(stress, "_answer", lambda core, submits: [(next(answers),)])
    assert len(stress.different_in_company(model, num_others=1, **SETTINGS)) == len(stress.KINDS)
