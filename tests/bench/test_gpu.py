"""The script for GPUs, dry: its control flow on a CPU, its report, and what stops nothing."""

from __future__ import annotations

import json
import time

import pytest
from pilotlight.bench import gpu, gpu_sections
from pilotlight.bench.gpu_report import prefill_flops, report
from pilotlight.bench.make_model import SHAPES

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2024-05-12 00:00:0{i},{5 + i},{3 + i}\n" for i in range(4)
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "trace.csv").write_text(TRACE)
    out = folder / "gpu.json"
    parts = ["limits", "parity", "decode", "prefill", "throughput", "trace"]
    flags = [flag for part in parts for flag in ("--only", part)]
    trace = ["--trace", str(folder / "trace.csv")]
    assert gpu.main(["--dry", "--out", str(out), *trace, *flags]) == 0
    assert out.with_suffix(".md").exists()
    return json.loads(out.read_text())


def test_a_dry_run_finds_everything(found: dict) -> None:
    assert found["parity"]["tiny-llama-gqa"] == {"num_equal": 160, "num_tokens": 160}
    assert [step["batch"] for step in found["decode"]["steps"]] == [1, 3]
    assert [prompt["input_len"] for prompt in found["prefill"]["prompts"]] == [16, 40]
    assert found["throughput"]["output_tokens_per_s"] > 0
    assert found["trace"]["output_tokens_per_s"] > 0
    assert all("failed" not in part for part in found.values())


def test_the_report_has_each_figure_beside_its_limit(found: dict) -> None:
    text = report(found)
    assert "weights' bytes of step" in text
    assert "of matmul peak" in text


def test_a_part_that_fails_is_told_and_ends_nothing() -> None:
    plan = gpu_sections.Plan(model="/nowhere", **gpu.DRY)
    failed = gpu.run("decode", plan, deadline_s=time.monotonic() + 100)
    assert "/nowhere" in failed["failed"]
    assert gpu.run("decode", plan, deadline_s=0.0) == {"skipped": "the deadline was over"}
    assert "failed: " in report({"machine": {}, "plan": {"shape": plan.shape}, "decode": failed})


def test_the_flops_of_a_prompt_are_those_of_its_weights() -> None:
    """Llama 3.1 8B: 7.0 billion weights in layers, and 0.5 in the head, for the last row alone."""
    assert prefill_flops(SHAPES["llama-3.1-8b"], 1) == pytest.approx(2 * 7.5e9, rel=0.01)
    attention = 32 * 2 * 4096 * 1000**2
    expected = 2 * 6.98e12 + attention
    assert prefill_flops(SHAPES["llama-3.1-8b"], 1000) == pytest.approx(expected, rel=0.01)
