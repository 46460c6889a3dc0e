"""The judge of engine life, on a clock that the test moves."""

from __future__ import annotations

from pilotlight.engine.messages import EngineStatistics, Heartbeat, StepRecord
from pilotlight.engine.watchdog import Watchdog

HEARTBEAT_TIMEOUT_S = 3.0
PROGRESS_TIMEOUT_S = 10.0


def _watchdog() -> Watchdog:
    return Watchdog(0.0, HEARTBEAT_TIMEOUT_S, PROGRESS_TIMEOUT_S)


def _beat(step: int, pulse: int, num_in_flight: int) -> Heartbeat:
    return Heartbeat(step, pulse, num_in_flight, 0.0, [], EngineStatistics())


def _run(watchdog: Watchdog, seconds: int, beat: Heartbeat | None, start_s: int = 0) -> str:
    """Judges once a second, with or without a beat; returns the last judgement."""
    reason = ""
    for now_s in range(start_s + 1, start_s + seconds + 1):
        if beat is not None:
            watchdog.hear(beat, float(now_s))
        reason = watchdog.stall_reason(float(now_s))
    return reason


def test_silence_is_a_stall_and_a_beat_ends_it() -> None:
    watchdog = _watchdog()
    assert _run(watchdog, 3, None) == ""
    assert "no heartbeat for 4.0 s" in _run(watchdog, 1, None, start_s=3)
    assert _run(watchdog, 1, _beat(0, 0, 0), start_s=4) == ""


def test_beats_without_progress_are_a_stall_only_with_work() -> None:
    assert _run(_watchdog(), 60, _beat(5, 5, num_in_flight=0)) == ""
    assert "no layer finished" in _run(_watchdog(), 12, _beat(5, 5, num_in_flight=1))


def test_layers_of_a_long_step_are_progress() -> None:
    watchdog = _watchdog()
    for now_s in range(1, 60):
        watchdog.hear(_beat(1, now_s, num_in_flight=1), float(now_s))
        assert watchdog.stall_reason(float(now_s)) == ""


def test_a_finished_step_is_progress() -> None:
    watchdog = _watchdog()
    watchdog.hear(_beat(1, 1, 1), 1.0)
    for now_s in range(1, 60):
        watchdog.hear(StepRecord(1, [], 0.0, 0.0, 1), float(now_s))
        assert watchdog.stall_reason(float(now_s)) == ""


def test_a_judge_that_slept_blames_nobody() -> None:
    watchdog = _watchdog()
    watchdog.stall_reason(1.0)
    assert watchdog.stall_reason(100.0) == "", "the judge itself was stopped"
    assert "no heartbeat" in _run(watchdog, 4, None, start_s=100)


def test_age_is_never_negative() -> None:
    watchdog = _watchdog()
    assert watchdog.heartbeat_age_s(2.5) == 2.5
    assert watchdog.heartbeat_age_s(-1.0) == 0.0
