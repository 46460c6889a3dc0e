"""`pilotlight bench serving` as it is called: what it refuses, sends, prints and returns."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from pilotlight.bench import serving
from pilotlight.engine.messages import Submit
from pilotlight.tests.bench.clock import Clock, set_clock
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.served import LIMIT_S, Served, served

SMALL = ("--input-len", "6", "--output-len", "4")
AT_ONCE = ("--rate", "inf", *SMALL)
DISTRIBUTION = {"p50", "p90", "p95", "p99", "mean", "max"}
FIELDS = {
    "model", "target", "rate", "concurrency", "trace", "seed", "is_interrupted",
    "num_requests", "num_ok", "num_errors", "errors", "num_clamped", "num_input_tokens",
    "num_output_tokens", "duration_s", "requests_per_s", "output_tokens_per_s",
    "total_tokens_per_s", "goodput_requests_per_s", "slo_ttft_ms", "slo_itl_ms", "ttft_s", "itl_s",
    "e2e_s", "send_lag_s",
}  # fmt: skip
"""Others script against these."""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    rows = ({"timestamp": 0, "input_length": n, "output_length": n + 1} for n in (5, 900, 7))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


async def bench(s: Served, *words: str) -> int:
    arguments = serving.parse(["--target", f"127.0.0.1:{s.server.port}", *words])
    async with asyncio.timeout(LIMIT_S):
        return await serving.run(arguments)


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The JSON line, which is all of standard output, and the report."""
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    result: dict[str, Any] = json.loads(out)
    assert result.keys() == FIELDS
    return result, err


def submits(s: Served) -> list[Submit]:
    return [m for m in s.engine.link.received if isinstance(m, Submit)]


# ---- mistakes --------------------------------------------------------------------------------

TRACE = ("--trace", "trace.csv")
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "no arrivals": ((), "--rate, --concurrency or --trace"),
    "both loops": (("--rate", "1", "--concurrency", "1"), "exclude each other"),
    "no rate": (("--rate", "0"), "--rate is 0.0"),
    "rate that is no number": (("--rate", "nan"), "--rate is nan"),
    "endless burst": (("--rate", "inf"), "--num-requests"),
    "no places": (("--concurrency", "0"), "--concurrency is 0"),
    "no requests": (("--rate", "1", "--max-requests", "0"), "--num-requests is 0"),
    "negative duration": (("--rate", "1", "--duration", "-1"), "--duration is -1.0"),
    "endless deadline": (("--rate", "1", "--deadline", "inf"), "--deadline is inf"),
    "endless wait": (("--rate", "1", "--wait-ready", "inf"), "--wait-ready is inf"),
    "objective of nothing": (("--rate", "1", "--slo-itl-ms", "0"), "--slo-itl-ms is 0.0"),
    "negative prefix": (("--rate", "1", "--shared-prefix-len", "-1"), "--shared-prefix-len is -1"),
    "negative seed": (("--rate", "1", "--seed", "-1"), "--seed is -1"),
    "speed of no trace": (("--rate", "1", "--speed", "2"), "--speed belongs to --trace"),
    "speed of other times": ((*TRACE, "--rate", "1", "--speed", "2"), "--speed is of the trace"),
    "speed of a closed loop": (
        (*TRACE, "--concurrency", "1", "--speed", "2"),
        "--speed is of the trace",
    ),
    "prompts of two lengths": ((*TRACE, "--input-len", "1"), "--trace brings the lengths"),
    "answers of two lengths": ((*TRACE, "--output-len", "1"), "--trace brings the lengths"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, reason = MISTAKES[case]
    assert serving.main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pilotlight bench serving: ")
    assert reason in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--input-len", "5:2"), "'5:2' is neither a length like 128 nor a range like 64:512"),
        (("--output-len", "x"), "'x' is neither a length"),
        (("--rate", "fast"), "invalid float value: 'fast'"),
        (("--rate", "1", "--color"), "unrecognized arguments: --color"),
    ],
)
def test_words_that_cannot_be_read_are_explained(
    words: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        serving.main(list(words))
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


def test_a_trace_that_cannot_be_used_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serving.main(["--trace", str(tmp_path / "absent.csv")]) == 2
    assert "absent.csv: No such file" in capsys.readouterr().err
    (tmp_path / "lengths.csv").write_text("input_len,output_len\n1,1\n")
    assert serving.main(["--trace", str(tmp_path / "lengths.csv")]) == 2
    assert "has no times: give --rate or --concurrency" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--num-requests", "--max-requests"])
def test_the_number_of_requests_has_two_names(flag: str) -> None:
    assert serving.parse(["--rate", "1", flag, "9"]).num_requests == 9


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        serving.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert "Exit codes:" in out


# ---- a run -----------------------------------------------------------------------------------


async def test_an_open_loop_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    async with served() as s:
        code = await bench(s, "--rate", "1000", *SMALL, "--num-requests", "5", "--seed", "3")
        target = f"127.0.0.1:{s.server.port}"
    result, report = printed(capsys)
    assert code == 0
    expected = {
        "target": target, "rate": 1000.0, "concurrency": None, "trace": None, "seed": 3,
        "is_interrupted": False, "num_requests": 5, "num_ok": 5, "num_errors": 0, "errors": {},
        "num_clamped": 0, "num_input_tokens": 30, "num_output_tokens": 20,
        "goodput_requests_per_s": None,
    }  # fmt: skip
    assert {name: result[name] for name in expected} == expected
    assert report.startswith("5 of 5 requests succeeded in ")
    assert "first token, ms" in report


async def test_figures_are_positive_and_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    async with served() as s:
        words = ("--input-len", "6", "--output-len", "40", "--num-requests", "6")
        await bench(s, "--concurrency", "2", *words)
    result, _ = printed(capsys)
    assert result["send_lag_s"].keys() == DISTRIBUTION
    for name in ("ttft_s", "itl_s", "e2e_s"):
        figures = result[name]
        assert figures.keys() == DISTRIBUTION
        assert 0 < figures["p50"] <= figures["p90"] <= figures["p95"] <= figures["p99"]
        assert figures["p99"] <= figures["max"]
    assert result["ttft_s"]["max"] <= result["e2e_s"]["max"] <= result["duration_s"]
    assert result["output_tokens_per_s"] == pytest.approx(240 / result["duration_s"], rel=1e-3)
    assert result["total_tokens_per_s"] == pytest.approx(276 / result["duration_s"], rel=1e-3)
    assert (result["rate"], result["concurrency"]) == (None, 2)


async def test_goodput_follows_the_objectives(capsys: pytest.CaptureFixture[str]) -> None:
    async with served() as s:
        await bench(s, *AT_ONCE, "--num-requests", "4", "--slo-ttft-ms", "1e9")
        met, report = printed(capsys)
        await bench(s, *AT_ONCE, "--num-requests", "4", "--slo-ttft-ms", "1e-9")
        missed, _ = printed(capsys)
    assert met["goodput_requests_per_s"] == met["requests_per_s"] > 0
    assert "goodput" in report
    assert missed["goodput_requests_per_s"] == 0
    assert missed["num_ok"] == 4


async def test_a_trace_is_replayed_and_what_does_not_fit_is_cut(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with served() as s:
        assert await bench(s, "--trace", str(trace)) == 0
        sent = sorted((len(m.prompt_ids), m.sampling.max_tokens) for m in submits(s))
    result, report = printed(capsys)
    assert sent == [(5, 6), (7, 8), (128, 128)]
    assert (result["trace"], result["num_ok"], result["num_clamped"]) == ("trace.jsonl", 3, 1)
    assert "1 x lengths changed to fit the context (1 to 256 tokens)" in report


HOURS_AFTER_EACH_OTHER = "arrival_s,input_len,output_len\n0,5,1\n36000,6,1\n72000,7,1\n"


@pytest.mark.parametrize("words", [("--rate", "inf"), ("--concurrency", "2"), ("--speed", "1e9")])
async def test_a_trace_can_come_at_other_times(
    tmp_path: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hours.csv").write_text(HOURS_AFTER_EACH_OTHER)
    async with served() as s:
        assert await bench(s, "--trace", str(tmp_path / "hours.csv"), *words) == 0
        assert sorted(len(m.prompt_ids) for m in submits(s)) == [5, 6, 7]
    assert printed(capsys)[0]["num_ok"] == 3


async def test_a_trace_can_be_cut_short(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with served() as s:
        await bench(s, "--trace", str(trace), "--max-requests", "1")
        assert [len(m.prompt_ids) for m in submits(s)] == [5]
    assert printed(capsys)[0]["num_requests"] == 1


async def test_a_duration_alone_has_no_other_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every reading of the clock takes 1 s; the default number of requests is of loads without."""
    async with served() as s:
        set_clock(monkeypatch, Clock(tick_s=1.0))
        await bench(s, "--concurrency", "1", "--duration", "1500", "--output-len", "1")
    result, _ = printed(capsys)
    assert result["num_ok"] > serving.DEFAULT_NUM_REQUESTS
    assert result["duration_s"] >= 1500


async def test_a_seed_sends_the_same_requests(capsys: pytest.CaptureFixture[str]) -> None:
    sent = []
    async with served() as s:
        for seed in ("1", "1", "2"):
            num_before = len(submits(s))
            await bench(
                s, "--concurrency", "1", "--input-len", "20", "--num-requests", "5",
                "--seed", seed, "--shared-prefix-len", "4",
            )  # fmt: skip
            sent.append([m.prompt_ids for m in submits(s)[num_before:]])
    assert len(sent[0]) == 5
    assert sent[0] == sent[1]
    assert sent[0] != sent[2]


async def test_failures_are_told_and_none_that_succeeded_is_exit_code_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with served(FakeEngine(is_held=True)) as s:
        task = asyncio.create_task(bench(s, *AT_ONCE, "--num-requests", "3"))
        await s.until(lambda: len(submits(s)) == 3)
        s.engine.link.kill()
        assert await task == 1
    result, report = printed(capsys)
    assert result["errors"] == {"UNAVAILABLE": 3}
    assert result["ttft_s"] == dict.fromkeys(DISTRIBUTION)
    assert report.startswith("0 of 3 requests succeeded")
    assert "3 x UNAVAILABLE: " in report
    assert "first token" not in report


async def test_an_interrupted_run_still_reports(capsys: pytest.CaptureFixture[str]) -> None:
    """Long before its end; cancelling is what Ctrl-C does. At least one request had ended."""
    async with served() as s:
        words = ("--concurrency", "2", "--num-requests", "1000", *SMALL)
        task = asyncio.create_task(bench(s, *words))
        await s.until(lambda: len(submits(s)) >= 3)
        s.engine.link.is_held = True
        await s.until(lambda: len(s.engine.link.core.live_request_ids()) == 2)
        task.cancel()
        assert await task == 0
        await s.until(lambda: not s.engine.link.core.live_request_ids())
    result, report = printed(capsys)
    assert result["is_interrupted"]
    assert result["num_ok"] >= 1
    assert result["errors"] == {"CANCELLED": 2}
    assert ", then interrupted\n" in report
