"""The limits table against requests made up by chance: exactly what is inside is let through."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pilotlight.engine.errors import InvalidField
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.proto import inference_pb2 as pb
from pilotlight.server.limits import DEFAULT_MAX_TOKENS, LIMITS, check_number, check_size
from pilotlight.server.validation import SamplingDefaults, sampling_params
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.server.test_bad_input import DOUBLES, NUMBERS

VOCAB_SIZE = 100
FACTS = FakeEngine(
    vocab_size=VOCAB_SIZE, context_len=int(LIMITS["stop.max_tokens"].high), block_size=1
).facts
INT64 = st.integers(-(2**63), 2**63 - 1)


def _values(field: str) -> st.SearchStrategy[float]:
    """Often inside, often at the border, sometimes anything that the wire can carry."""
    limit = LIMITS[field]
    if field in DOUBLES:
        return st.floats(limit.low, limit.high) | st.floats()
    low, high = int(limit.low), int(limit.high)
    return st.integers(low, high) | st.integers(low - 2, high + 2) | INT64


REQUESTS = st.fixed_dictionaries({}, optional={field: _values(field) for field in NUMBERS})
BIASES = st.dictionaries(
    st.integers(0, VOCAB_SIZE - 1) | INT64, st.floats(-100, 100) | st.floats(), max_size=3
)


def _is_inside(field: str, value: float) -> bool:
    limit = LIMITS[field]
    return math.isfinite(value) and limit.low <= value <= limit.high


def _bad_fields(values: dict[str, float], biases: dict[int, float]) -> set[str]:
    bad = {field for field, value in values.items() if not _is_inside(field, value)}
    max_tokens = values.get("stop.max_tokens", DEFAULT_MAX_TOKENS)
    if values.get("stop.min_tokens", 0) > max_tokens:
        bad.add("stop.min_tokens")
    for token_id, bias in biases.items():
        if not 0 <= token_id < VOCAB_SIZE:
            bad.add("sampling.logit_bias key")
        if not _is_inside("sampling.logit_bias[]", bias):
            bad.add(f"sampling.logit_bias[{token_id}]")
    return bad


def _request(values: dict[str, float], biases: dict[int, float]) -> pb.GenerateRequest:
    request = pb.GenerateRequest()
    for field, value in values.items():
        group, _, name = field.rpartition(".")
        setattr(getattr(request, group), name, value)
    request.sampling.logit_bias.update(biases)
    return request


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=REQUESTS, biases=BIASES)
def test_a_request_is_let_through_exactly_when_all_of_it_is_inside(
    values: dict[str, float], biases: dict[int, float]
) -> None:
    bad = _bad_fields(values, biases)
    try:
        params = sampling_params(_request(values, biases), FACTS, SamplingDefaults(), seed=7)
    except InvalidField as error:
        assert error.field in bad
    else:
        assert not bad
        _assert_holds(params, values, biases)


def _assert_holds(
    params: SamplingParams, values: dict[str, float], biases: dict[int, float]
) -> None:
    """Nothing was changed on the way, and nothing absent became zero."""
    assert params.logit_bias == biases
    assert params.seed == 7
    for field in NUMBERS:
        name = field.rpartition(".")[2]
        name = "num_logprobs" if name == "logprobs" else name
        default = getattr(SamplingParams(max_tokens=DEFAULT_MAX_TOKENS), name)
        assert getattr(params, name) == values.get(field, default)


@pytest.mark.parametrize("field", LIMITS)
def test_both_ends_of_a_limit_belong_to_it(field: str) -> None:
    limit = LIMITS[field]
    check = check_size if limit.unit else check_number
    for value in (limit.low, limit.high):
        check(field, int(value) if limit.unit else value)
    for value in (limit.low - 1, limit.high + 1):
        with pytest.raises(InvalidField) as refused:
            check(field, int(value) if limit.unit else value)
        assert refused.value.limit == limit.text()


def test_a_long_value_comes_back_short() -> None:
    error = InvalidField("field", "x" * 10_000, "limit")
    assert len(error.value) <= 80
    assert len(str(error)) < 120
