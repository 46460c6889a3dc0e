"""The loader's bench over the demo model: every stage has a rate, and the line is JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pilotlight.bench import loader
from pilotlight.engine.errors import ConfigError


def test_every_stage_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert loader.main(["--cache", str(tmp_path), "--repeat", "1", "--direct", "off"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["bytes_per_s"]) == {"limit.read", "limit.copy", "read", "arrive"}
    assert all(rate > 0 for rate in result["bytes_per_s"].values())
    assert result["num_bytes"] > 1 << 20


def test_no_run_is_no_measurement() -> None:
    with pytest.raises(ConfigError, match="--repeat"):
        loader.main(["--repeat", "0"])
