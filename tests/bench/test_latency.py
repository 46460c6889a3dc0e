"""From moments to figures: gaps between tokens, percentiles, rates, goodput, errors by status."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from pilotlight.bench.arrivals import Planned
from pilotlight.bench.latency import Objectives, Outcome, distribution, first_messages, summary

NONE = Objectives()


def answered(
    token_moments: Sequence[float], due_s: float = 0.0, sent_s: float | None = None
) -> Outcome:
    """A success: ten tokens of prompt, and one token at each of `token_moments`."""
    planned = Planned(due_s, 10, len(token_moments))
    outcome = Outcome(planned, due_s, due_s if sent_s is None else sent_s)
    for moment in token_moments:
        outcome.hear(1, moment)
    outcome.end(token_moments[-1])
    return outcome


def failed(code: str, message: str = "", ended_s: float = 1.0) -> Outcome:
    outcome = Outcome(Planned(0.0, 10, 5), 0.0, 0.0)
    outcome.end(ended_s, code, message)
    return outcome


# ---- one request -----------------------------------------------------------------------------


def test_tokens_that_come_together_share_the_time_before_them() -> None:
    outcome = Outcome(Planned(0.0, 1, 6), 0.0, 0.0)
    outcome.hear(2, 1.0)
    outcome.hear(1, 1.5)
    outcome.hear(3, 3.0)
    assert outcome.first_token_s == 1.0
    assert list(outcome.gaps_s) == [0.5, 0.5, 0.5, 0.5]
    assert outcome.num_output_tokens == 6


def test_a_message_without_tokens_is_no_token() -> None:
    outcome = Outcome(Planned(0.0, 1, 2), 0.0, 0.0)
    for num_tokens, now_s in ((0, 1.0), (1, 2.0), (0, 3.0), (1, 4.0), (0, 5.0)):
        outcome.hear(num_tokens, now_s)
    assert outcome.first_token_s == 2.0
    assert list(outcome.gaps_s) == [2.0]


def test_latencies_count_from_when_a_request_was_due() -> None:
    outcome = answered([12.0, 13.0], due_s=10.0, sent_s=11.5)
    assert outcome.ttft_s == 2.0
    assert outcome.e2e_s == 3.0


def test_one_token_has_no_gap() -> None:
    assert answered([1.0]).mean_itl_s == 0.0


@pytest.mark.parametrize("num_tokens", [4, 6])
def test_an_answer_of_another_length_is_no_success(num_tokens: int) -> None:
    outcome = Outcome(Planned(0.0, 1, 5), 0.0, 0.0)
    outcome.hear(num_tokens, 1.0)
    outcome.end(1.0)
    assert outcome.code == "INCOMPLETE"
    assert outcome.message == f"{num_tokens} of 5 tokens came"


def test_a_status_is_kept_whatever_came_before_it() -> None:
    outcome = Outcome(Planned(0.0, 1, 5), 0.0, 0.0)
    outcome.hear(2, 1.0)
    outcome.end(2.0, "UNAVAILABLE", "gone")
    assert (outcome.code, outcome.message, outcome.ended_s) == ("UNAVAILABLE", "gone", 2.0)


# ---- many ------------------------------------------------------------------------------------


def test_percentiles_interpolate() -> None:
    figures = distribution([float(i) for i in range(101)][::-1])
    assert figures == {
        "p50": 50.0,
        "p90": 90.0,
        "p95": 95.0,
        "p99": 99.0,
        "mean": 50.0,
        "max": 100.0,
    }
    assert distribution([1.0, 2.0])["p90"] == pytest.approx(1.9)


def test_of_nothing_there_is_nothing_to_say() -> None:
    assert set(distribution([]).values()) == {None}
    assert distribution([]).keys() == distribution([1.0]).keys()


def test_a_summary_counts_and_rates() -> None:
    """Two answers of 10 + 4 tokens and one failure, 4 s after the load began at 100."""
    outcomes = [
        answered([101.0, 101.5, 102.0, 102.5], due_s=100.0),
        failed("INTERNAL", ended_s=103.0),
        answered([102.0, 103.0, 103.5, 104.0], due_s=101.0, sent_s=101.25),
    ]
    figures = summary(outcomes, 100.0, NONE)
    assert (figures["num_requests"], figures["num_ok"], figures["num_errors"]) == (3, 2, 1)
    assert (figures["num_input_tokens"], figures["num_output_tokens"]) == (20, 8)
    assert figures["duration_s"] == 4.0
    assert figures["requests_per_s"] == 0.5
    assert figures["output_tokens_per_s"] == 2.0
    assert figures["total_tokens_per_s"] == 7.0
    assert (figures["ttft_s"]["mean"], figures["ttft_s"]["max"]) == (1.0, 1.0)
    assert (figures["e2e_s"]["p50"], figures["e2e_s"]["max"]) == (2.75, 3.0)
    assert (figures["itl_s"]["p50"], figures["itl_s"]["max"]) == (0.5, 1.0)
    assert figures["send_lag_s"]["max"] == 0.25


def test_failures_are_counted_by_status_and_stay_out_of_latencies() -> None:
    outcomes = [
        failed("UNAVAILABLE", ended_s=9.0),
        answered([1.0, 2.0]),
        failed("RESOURCE_EXHAUSTED"),
        failed("UNAVAILABLE"),
    ]
    figures = summary(outcomes, 0.0, NONE)
    assert list(figures["errors"].items()) == [("RESOURCE_EXHAUSTED", 1), ("UNAVAILABLE", 2)]
    assert figures["e2e_s"]["max"] == 2.0
    assert figures["duration_s"] == 9.0


def test_of_each_status_the_first_message_is_told() -> None:
    outcomes = [failed("A", "one"), answered([1.0]), failed("B", "two"), failed("A", "three")]
    assert first_messages(outcomes) == {"A": "one", "B": "two"}


def test_requests_that_were_cut_are_counted() -> None:
    cut = Outcome(Planned(0.0, 1, 1, is_clamped=True), 0.0, 0.0)
    cut.end(1.0, "INTERNAL")
    assert summary([cut, answered([1.0])], 0.0, NONE)["num_clamped"] == 1


@pytest.mark.parametrize("outcomes", [[], [failed("INTERNAL")], [answered([0.0])]])
def test_a_summary_is_json_of_the_same_names_whatever_happened(outcomes: list[Outcome]) -> None:
    whole = summary([answered([1.0, 2.0])], 0.0, NONE)
    assert summary(outcomes, 0.0, NONE).keys() == whole.keys()
    json.dumps(summary(outcomes, 0.0, NONE), allow_nan=False)


# ---- objectives ------------------------------------------------------------------------------

QUICK_START = answered([0.1, 0.6, 1.1])  # first after 100 ms, then 500 ms
QUICK_TOKENS = answered([1.0, 1.05, 1.1])  # first after 1000 ms, then 50 ms


@pytest.mark.parametrize(
    ("ttft_ms", "itl_ms", "num_met"),
    [(200, None, 1), (None, 100, 1), (200, 100, 0), (2000, 1000, 2), (50, 10, 0)],
)
def test_goodput_counts_who_met_all_objectives(
    ttft_ms: float | None, itl_ms: float | None, num_met: int
) -> None:
    """Over 1.1 s. A failure meets nothing."""
    outcomes = [QUICK_START, QUICK_TOKENS, failed("INTERNAL")]
    figures = summary(outcomes, 0.0, Objectives(ttft_ms, itl_ms))
    assert figures["goodput_requests_per_s"] == pytest.approx(num_met / 1.1, abs=1e-4)
    assert (figures["slo_ttft_ms"], figures["slo_itl_ms"]) == (ttft_ms, itl_ms)


def test_the_objective_between_tokens_is_of_the_mean() -> None:
    one_slow_gap = answered([1.0, 1.01, 1.02, 1.33])
    assert Objectives(itl_ms=120).are_met(one_slow_gap)
    assert not Objectives(itl_ms=100).are_met(one_slow_gap)


def test_without_objectives_there_is_no_goodput() -> None:
    assert summary([QUICK_START], 0.0, NONE)["goodput_requests_per_s"] is None
