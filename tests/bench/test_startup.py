"""`pilotlight bench startup`: its figures, its proofs, its peers' protocol; once for real."""

from __future__ import annotations

import json
import mmap
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilotlight.bench import (
    startup,
    startup_cold,
    startup_limits,
    startup_peers,
    startup_picture,
)
from pilotlight.bench.startup_figures import (
    Span,
    Start,
    attributed,
    cold_ratio,
    covered_s,
    paired_ratio,
    phase_medians,
    spans_of,
    summary,
)
from pilotlight.engine.errors import ConfigError

LIMITS = {"floor_s": 0.5, "num_bytes": 1000, "cold_read_1_bytes_per_s": 500}


def _start(first_token_s: float, *spans: Span) -> Start:
    moments = {"ports_open_s": 0.1, "ready_s": 0.8, "first_token_s": first_token_s}
    return Start(moments, spans, 0.9)


# ---- figures -----------------------------------------------------------------------------------


def test_a_summary_is_median_and_extremes() -> None:
    assert summary([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "min": 1.0, "max": 10.0}


@pytest.mark.parametrize("key", ["seconds", "s", "duration_s"])
def test_phases_are_read_whatever_their_length_is_called(key: str) -> None:
    phase = {"name": "warm", "started_s": 1.0, key: 0.5, "parent": None, "unknown": 1}
    assert spans_of({"phases": [phase]}) == (Span("warm", 1.0, 0.5),)


def test_what_phases_explain_is_their_union_without_children() -> None:
    phases = [
        {"name": "a", "started_s": 0.0, "s": 0.4},
        {"name": "b", "started_s": 0.2, "s": 0.4},
        {"name": "in_b", "started_s": 0.6, "s": 0.3, "parent": "b"},
        {"name": "late", "started_s": 0.9, "s": 5.0},
    ]
    assert attributed({"phases": phases}, 1.0) == pytest.approx(0.7)
    assert attributed({"phases": phases, "attributed": 0.99}, 1.0) == 0.99


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8), st.integers(1, 40))
def test_covered_seconds_are_counted_once(pairs: list[tuple[int, int]], end: int) -> None:
    seconds = {s for began, length in pairs for s in range(began, began + length) if s < end}
    assert covered_s([Span("x", *map(float, pair)) for pair in pairs], end) == len(seconds)


def test_a_phase_that_comes_twice_counts_as_its_sum() -> None:
    twice = _start(1.0, Span("a", 0.0, 1.0), Span("a", 2.0, 2.0))
    assert phase_medians([twice, _start(1.0, Span("a", 0.0, 5.0), Span("b", 5.0, 1.0))]) == {
        "a": 4.0,
        "b": 1.0,
    }


def test_ratios_are_of_pairs_and_of_what_must_be_read() -> None:
    ours, theirs = [_start(1.0), _start(2.0), _start(9.0)], [_start(4.0), _start(4.0)]
    assert paired_ratio(theirs, ours) == 3.0
    assert cold_ratio(3.0, 1.0, 1000, 500) == 1.0


# ---- order and report ----------------------------------------------------------------------------


def test_kinds_alternate_and_stop_at_their_count() -> None:
    order: list[str] = []

    def kind(name: str) -> Any:
        return lambda: order.append(name) or _start(1.0)

    starts: dict[str, list[Start]] = {n: [] for n in "abc"}
    kinds = {n: kind(n) for n in "abc"}
    assert not startup.alternate(kinds, {"a": 3, "b": 3, "c": 1}, starts)
    rounds = [order[:3], order[3:5], order[5:]]
    assert [sorted(round) for round in rounds] == [["a", "b", "c"], ["a", "b"], ["a", "b"]]
    assert {name: len(all_) for name, all_ in starts.items()} == {"a": 3, "b": 3, "c": 1}


def test_an_interruption_keeps_what_was_measured() -> None:
    def interrupted() -> Start:
        if starts["a"]:
            raise KeyboardInterrupt
        return _start(1.0)

    starts: dict[str, list[Start]] = {"a": []}
    assert startup.alternate({"a": interrupted}, {"a": 3}, starts)
    assert len(starts["a"]) == 1


def test_a_peer_that_fails_is_left_out_and_ours_are_not() -> None:
    def fails() -> Start:
        raise ConfigError("no token")

    starts: dict[str, list[Start]] = {"pilotlight": [], "vllm": []}
    kinds = {"pilotlight": lambda: _start(1.0), "vllm": fails}
    assert not startup.alternate(kinds, {"pilotlight": 2, "vllm": 2}, starts)
    assert [len(all_) for all_ in starts.values()] == [2, 0]
    with pytest.raises(ConfigError):
        startup.alternate({"pilotlight": fails}, {"pilotlight": 1}, starts)


def test_the_report_has_every_part_and_a_table() -> None:
    span = Span("warm", 0.0, 0.7)
    seconds = {
        "pilotlight": 1.0,
        "cold": 3.0,
        "standby": 0.2,
        "first boot": 3.0,
        "direct load": 2.0,
    }
    starts = {kind: [_start(s, span)] for kind, s in seconds.items()}
    starts["transformers"] = [Start({"first_token_s": 4.0}, (span,))]
    result = json.loads(json.dumps(startup.report(starts, LIMITS, [0.0, 0.002])))
    assert result["first_token_s"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert result["phases"] == {"warm": 0.7}
    assert result["attributed"] == 0.9
    ratios = {"transformers": 4.0, "floor": 2.0, "first boot, of direct": 1.0}
    assert result["ratios"] == ratios
    assert result["cold"]["resident_before"] == 0.002
    assert result["cold"]["ratio"] == 1.0
    assert result["standby"]["first_token_s"]["median"] == 0.2
    assert "transformers first token" in startup.table(result)


# ---- cold ----------------------------------------------------------------------------------------


def test_pages_are_dropped_and_the_proof_sees_those_that_are_not(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x" * (4 << 20))
    assert startup_cold.resident_fraction([file]) > 0.9
    try:
        assert startup_cold.drop_pages([file]) < 0.01
    except ConfigError:
        pytest.skip("this file system keeps its files in memory")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as held:
        assert sum(held[:: mmap.PAGESIZE]) > 0  # mapped pages are not dropped
        with pytest.raises(ConfigError, match="still in memory"):
            startup_cold.drop_pages([file])


def test_where_pages_stay_there_is_no_cold_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(files: list[Path]) -> float:
        raise ConfigError(f"{files} stay")

    monkeypatch.setattr(startup_limits, "drop_pages", refuse)
    monkeypatch.setattr(startup_limits, "run_s", lambda _code: 1.0)
    monkeypatch.setattr(startup_limits, "COPY_BYTES", 1 << 20)
    (tmp_path / "weights").write_bytes(b"x" * (1 << 20))
    limits = startup_limits.measure_limits(tmp_path / "weights")
    assert not [name for name in limits if "cold" in name]
    assert limits["num_bytes"] == 1 << 20
    assert limits["floor_s"] >= 1.0


def test_reading_stops_with_an_error_where_the_file_became_shorter(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"x" * 100)
    with pytest.raises(EOFError, match="100 of 200"):
        startup_limits._read(tmp_path / "weights", 0, 200)


# ---- peers ---------------------------------------------------------------------------------------

PEER = """
import json
print("a library's banner")
for moment in ("imported", "loaded", "first_token"):
    print(json.dumps({"moment": moment}), flush=True)
"""


def test_a_peer_is_timed_to_its_first_token_line() -> None:
    start = startup_peers.time_peer([sys.executable, "-c", PEER])
    assert [span.name for span in start.spans] == ["imported", "loaded", "first_token"]
    assert start.spans[-1].ended_s == pytest.approx(start.moments["first_token_s"])


def test_a_peer_without_a_token_is_shown_with_its_last_words() -> None:
    code = "import sys; sys.exit('no such model')"
    with pytest.raises(ConfigError, match="no such model"):
        startup_peers.time_peer([sys.executable, "-c", code])


def test_peers_that_are_unknown_or_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="'tgi' is unknown"):
        startup_peers.chosen_peers("vllm,tgi")
    with pytest.raises(ConfigError, match="--peer-python vllm=PYTHON"):
        startup_peers.command_of(startup_peers.PEERS["vllm"], {"vllm": "/no/python"}, Path("m"))


def test_every_peer_has_its_driver() -> None:
    drivers = {path.name for path in startup_peers.DRIVERS.glob("with_*.py")}
    assert drivers == {f"with_{name}.py" for name in startup_peers.PEERS}


# ---- picture, and all of it ----------------------------------------------------------------------


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    startup_picture.draw({"ours": _start(1.0, Span("warm", 0.0, 0.7))}, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup_picture, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"pilotlight\[bench\]"):
        startup_picture.check_can_draw()


def test_real_starts_of_the_demo_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--repeat", "1", "--standby", "--cache", str(tmp_path / "cache")]
    assert startup.main([*flags, "--json", str(tmp_path / "out.json")]) == 0
    line = capfd.readouterr().out.splitlines()[-1]
    result = json.loads(line)
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert result["artefact"].endswith("arena.bin")
    moments = [result[n]["median"] for n in ("ports_open_s", "ready_s", "first_token_s")]
    assert moments == sorted(moments)
    assert "warm" in result["phases"]
    assert result["limits"]["import_torch_s"] > 0.0
    assert 0.0 < result["attributed"] <= 1.01
    assert result["standby"]["first_token_s"]["median"] > 0.0
