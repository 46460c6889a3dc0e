"""Comparisons: cases, children that answer lines, ratios to the best other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pilotlight.bench import compare
from pilotlight.bench.compare import Case, Child, case_of
from pilotlight.engine.errors import ConfigError

CHILD = """
import json, sys
print("a library says hello"); print(json.dumps({"moment": "loaded"}), flush=True)
for line in sys.stdin:
    n, i, o, seed = map(int, line.split())
    if n == 9: sys.exit(3)
    print("noise"); print(json.dumps({"s": n * o / float(sys.argv[1])}), flush=True)
"""


@pytest.mark.parametrize("text", ["", "1x2", "1x2x3x4", "axbxc", "0x1x1", "65x1x1"])
def test_what_is_no_case_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--case"):
        case_of(text)


def test_children_run_in_turn_and_the_ratio_is_to_the_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare, "read_bytes_per_s", lambda: 2e9)
    names = {"pilotlight": "300", "slow": "100", "fast": "200"}
    children = [Child(n, (sys.executable, "-c", CHILD, rate)) for n, rate in names.items()]
    try:
        for child in children:
            child.wait_loaded()
        seconds, reads = compare.measure(children, [Case(2, 3, 4)], repeat=2)
    finally:
        for child in children:
            child.__exit__()
    result = compare.report(seconds, reads, 1_000_000_000, "/models/tiny")
    assert result["limit_tokens_per_s"] == 2.0
    assert result["cases"]["2x3x4"]["ratio"] == 1.5
    assert "| 2x3x4 | 300.00 (300.00 to 300.00)" in "\n".join(compare.table(result))


def test_a_child_that_ends_is_named() -> None:
    with Child("vllm", (sys.executable, "-c", CHILD, "1")) as child:
        child.wait_loaded()
        with pytest.raises(ConfigError, match=r"vllm ended \(3\)"):
            child.run(Case(9, 1, 1), 0)


def test_our_own_child_on_the_demo_model(capsys: pytest.CaptureFixture[str]) -> None:
    demo = Path(compare.__file__).parent.parent / "demo" / "model"
    assert compare.main([str(demo), "--case", "2x4x3", "--repeat", "1"]) == 0
    assert '"2x4x3"' in capsys.readouterr().out
