"""The parts of a decode step add up, and measuring leaves the engine as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pilotlight.bench import speculation, step
from pilotlight.kernels.cpu import native


def test_what_nobody_claims_is_the_record() -> None:
    seconds = {"schedule": 1.0, "inputs": 2.0, "network": 50.0, "kernels": 40.0, "apply": 3.0}
    parts = step.split(seconds, step_s=60.0, channel_s=5.0)
    assert parts["glue"] == 10.0
    assert parts["record"] == 60.0 - 1.0 - 2.0 - 50.0 - 3.0
    assert sum(parts[name] for name in step.COLUMNS) == parts["step"] == 65.0


def test_the_engines_functions_are_their_own_again() -> None:
    before = [getattr(owner, method) for _, owner, method in step.PARTS]
    with step.timed_parts():
        assert all(
            getattr(owner, method) is not function
            for (_, owner, method), function in zip(step.PARTS, before, strict=True)
        )
    assert [getattr(owner, method) for _, owner, method in step.PARTS] == before


@pytest.mark.skipif(native.library() is None, reason=native.missing_reason() or "")
def test_steps_of_the_demo_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--num-seqs", "1", "3", "--input-len", "4", "--output-len", "6"]
    assert step.main([*options, "--num-threads", "1", "--save", str(tmp_path / "step")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["num_seqs"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert row["kernels_us"] > 0
        assert 0 < row["outside_kernels_percent"] < 100
    assert json.loads((tmp_path / "step.json").read_text()) == result
    assert "| 3 |" in (tmp_path / "step.md").read_text()


def test_modes_of_the_demo_model(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--num-seqs", "1", "--output-len", "12", "--repeat", "1", "--num-threads", "1"]
    assert speculation.main(options) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["prompt"] for row in rows] == list(speculation.TEXTS)
    for row in rows:
        assert row["off"]["num_drafted"] == 0
        assert row["ngram"]["num_steps"] <= row["off"]["num_steps"] == 12
    assert rows[0]["ngram"]["num_accepted"] > 0
