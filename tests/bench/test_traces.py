"""Traces of real traffic: the formats that are understood, and how others are refused."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pilotlight.bench.arrivals import Planned
from pilotlight.bench.traces import read_trace
from pilotlight.engine.errors import ConfigError

AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9305900,396,109
"""
MOONCAKE = """\
{"timestamp": 27482, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}
{"timestamp": 30482, "input_length": 7322, "output_length": 490, "hash_ids": [0, 14]}
"""
VIDUR = """\
num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio
3772,54,3826,69.85
2015,156,2171,12.91
"""


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def zone_with_summer_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Central Europe, without the machine's table of zones."""
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        yield
    time.tzset()


# ---- what is understood ----------------------------------------------------------------------


def test_azure(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, "azure.csv", AZURE))
    assert trace.has_times
    assert trace.plans[0] == Planned(0.0, 374, 44)
    assert trace.plans[1].at_s == pytest.approx(4.25)
    assert (trace.plans[1].input_len, trace.plans[1].output_len) == (396, 109)


def test_mooncake(tmp_path: Path) -> None:
    """Its times are milliseconds; the first request is the start."""
    trace = read_trace(write(tmp_path, "mooncake.jsonl", MOONCAKE))
    assert trace.has_times
    assert trace.plans == [Planned(0.0, 6758, 500), Planned(3.0, 7322, 490)]


def test_vidur_has_lengths_only(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, "vidur.csv", VIDUR))
    assert not trace.has_times
    assert trace.plans == [Planned(0.0, 3772, 54), Planned(0.0, 2015, 156)]


def test_seconds_and_other_spellings(tmp_path: Path) -> None:
    """A byte-order mark, spaces after commas, capitals, columns in any order, blank lines."""
    text = "\ufeffOutput_Tokens, ARRIVAL_S, User, Prompt_Tokens\n7, 1.5, ann, 3\n\n8, 2.0, bob, 4\n"
    trace = read_trace(write(tmp_path, "other.csv", text))
    assert trace.plans == [Planned(0.0, 3, 7), Planned(0.5, 4, 8)]


def test_requests_are_put_in_order(tmp_path: Path) -> None:
    text = "arrival_s,input_len,output_len\n9,1,1\n4,2,2\n6,3,3\n"
    plans = read_trace(write(tmp_path, "mixed.csv", text)).plans
    assert plans == [Planned(0.0, 2, 2), Planned(2.0, 3, 3), Planned(5.0, 1, 1)]


def test_dates_with_a_zone_are_compared_by_it(tmp_path: Path) -> None:
    rows = "2024-05-10T12:00:00+00:00,1,1\n2024-05-10T14:00:03+02:00,2,2\n"
    trace = read_trace(write(tmp_path, "zones.csv", f"timestamp,input_len,output_len\n{rows}"))
    assert [planned.at_s for planned in trace.plans] == [0.0, 3.0]


@pytest.mark.usefixtures("zone_with_summer_time")
def test_a_clock_that_is_set_forward_here_leaves_gaps_as_they_were(tmp_path: Path) -> None:
    rows = "2024-03-31 01:59:59,1,1\n2024-03-31 03:00:01,2,2\n"
    trace = read_trace(write(tmp_path, "spring.csv", f"TIMESTAMP,input_len,output_len\n{rows}"))
    assert [planned.at_s for planned in trace.plans] == [0.0, 3602.0]


def test_a_faster_replay_keeps_lengths(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, "mooncake.jsonl", MOONCAKE)).faster(4.0)
    assert trace.has_times
    assert trace.plans == [Planned(0.0, 6758, 500), Planned(0.75, 7322, 490)]


# ---- what is refused -------------------------------------------------------------------------

HEADER = "timestamp,input_length,output_length\n"
BAD: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("a.csv", "", "is empty"),
    "only a header": ("a.csv", HEADER, "is empty"),
    "no lines": ("a.jsonl", "\n\n", "is empty"),
    "other columns": ("a.csv", "model,hardware\nA,a100\n", "it has model, hardware; understood"),
    "no output": ("a.csv", "input_len,n\n1,2\n", "no columns of input and output lengths"),
    "no number": ("a.csv", HEADER + "0,1,1\n0,many,1\n", "row 2 cannot be read"),
    "a short row": ("a.csv", HEADER + "0,1,1\n0,1\n", "row 2 cannot be read"),
    "no date": ("a.csv", HEADER + "yesterday,1,1\n", "row 1 cannot be read"),
    "no time": ("a.csv", HEADER + "nan,1,1\n", "nan is no time"),
    "endless time": ("a.csv", HEADER + "0,1,1\ninf,1,1\n", "inf is no time"),
    "a huge field": ("a.csv", HEADER + "0,1," + "9" * 200_000 + "\n", "row 1 cannot be read"),
    "packed": ("a.tar.gz", b"\x1f\x8b\x08\x00" * 50_000, "row 1 cannot be read"),
    "no JSON": ("a.jsonl", MOONCAKE + "{", "row 3 cannot be read"),
    "JSON without a key": ("a.jsonl", MOONCAKE + '{"timestamp": 1}', "row 3 lacks 'input_length'"),
    "JSON of numbers": ("a.jsonl", "1\n2\n", "row 1 cannot be read"),
    "JSON of another object": ("a.json", json.dumps({"rows": []}), "it has rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_trace_is_refused_in_one_readable_line(tmp_path: Path, case: str) -> None:
    name, content, reason = BAD[case]
    path = write(tmp_path, name, content)
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    message = str(caught.value)
    assert str(path) in message
    assert reason in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 400


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.csv: No such file"):
        read_trace(tmp_path / "absent.csv")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_trace(tmp_path)
