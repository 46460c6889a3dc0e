"""The script for GPUs, dry: its control flow on a CPU, its report, and what stops nothing."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from pilotlight.bench import gpu, gpu_sections
from pilotlight.bench.gpu_report import prefill_flops, report
from pilotlight.bench.make_model import SHAPES
from pilotlight.kernels.triton.tiles import Tiles, candidates

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2024-05-12 00:00:0{i},{5 + i},{3 + i}\n" for i in range(4)
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "trace.csv").write_text(TRACE)
    out = folder / "gpu.json"
    parts = ["limits", "parity", "stress", "decode", "prefill", "throughput", "trace"]
    flags = [flag for part in parts for flag in ("--only", part)]
    trace = ["--trace", str(folder / "trace.csv")]
    assert gpu.main(["--dry", "--out", str(out), *trace, *flags]) == 0
    assert out.with_suffix(".md").exists()
    return json.loads(out.read_text())


def test_a_dry_run_finds_everything(found: dict) -> None:
    assert found["parity"]["tiny-llama-gqa"] == {"num_equal": 160, "num_tokens": 160}
    assert [step["batch"] for step in found["decode"]["steps"]] == [1, 3]
    assert [prompt["input_len"] for prompt in found["prefill"]["prompts"]] == [16, 40]
    assert (found["stress"]["num_requests"], found["stress"]["wrong"]) == (20, [])
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


def test_tiles_that_are_wrong_or_do_not_fit_are_told_and_others_ranked() -> None:
    wanted = torch.ones(4)

    def run(chosen: Tiles | None) -> tuple[torch.Tensor, float]:
        if chosen is not None and chosen.keys == 128:
            raise RuntimeError("out of shared memory")
        is_wrong = chosen is not None and chosen.num_warps == 2
        spent_s = 5.0 if chosen is None else chosen.num_stages / chosen.keys
        return wanted * (2 if is_wrong else 1), spent_s

    found = gpu_sections.tried(run, candidates(is_decode=True), until_s=math.inf)
    assert found["now_us"] == 5e6
    assert found["best"][0][1] == str(Tiles(16, 64, 4, 2))
    assert [spent for spent, _ in found["best"]] == sorted(spent for spent, _ in found["best"])
    assert len(found["best"]) == 8
    assert len(found["failures"]) == 27 - 3 * 2 * 2
    assert sum("out of shared memory" in failure for failure in found["failures"]) == 9
    text = report({"machine": {}, "plan": {"shape": "llama-3.1-8b"}, "tiles": {"decodes": found}})
    assert "| decodes | 5000000.0 | in use |" in text


def test_a_search_for_tiles_ends_in_time() -> None:
    found = gpu_sections.tried(lambda chosen: (torch.ones(1), 1.0), candidates(False), until_s=0.0)
    assert found["best"] == []


def test_the_flops_of_a_prompt_are_those_of_its_weights() -> None:
    """Llama 3.1 8B: 7.0 billion weights in layers, and 0.5 in the head, for the last row alone."""
    assert prefill_flops(SHAPES["llama-3.1-8b"], 1) == pytest.approx(2 * 7.5e9, rel=0.01)
    attention = 32 * 2 * 4096 * 1000**2
    expected = 2 * 6.98e12 + attention
    assert prefill_flops(SHAPES["llama-3.1-8b"], 1000) == pytest.approx(expected, rel=0.01)
