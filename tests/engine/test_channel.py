"""Frames: any cut of the stream gives the same messages; nonsense is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilotlight.engine.channel import LENGTH, MAX_FRAME_BYTES, frame, reader_in_engine
from pilotlight.engine.channel import reader_in_front as front_reader
from pilotlight.engine.config import EngineConfig
from pilotlight.engine.errors import EngineError
from pilotlight.engine.messages import (
    Abort,
    Boot,
    FinishReason,
    Output,
    StepRecord,
    Stop,
    Submit,
    ToEngine,
    TopLogprob,
)
from pilotlight.engine.sampling_params import SamplingParams

MESSAGES: list[ToEngine] = [
    Boot(EngineConfig(model="folder")),
    Submit("a", [1, 2, 3], SamplingParams(logit_bias={5: -1.0}, seed=2**64 - 1, n=3), "salt"),
    Abort(["a", "b"]),
    Abort(["a"], 2),
    Stop(),
]


@given(st.lists(st.integers(1, 50), min_size=1))
def test_any_cut_gives_the_same_messages(sizes: list[int]) -> None:
    data = b"".join(map(frame, MESSAGES))
    reader = reader_in_engine()
    received = []
    while data:
        size = sizes[len(data) % len(sizes)]
        received += reader.feed(data[:size])
        data = data[size:]
    assert received == MESSAGES


def test_a_step_record_survives_whole() -> None:
    output = Output("a", 1, [7], FinishReason.STOP, 7, 4, [-0.5], [[TopLogprob(7, -0.5)]], 1.5)
    record = StepRecord(3, [output], 1.0, 0.5, 9)
    assert list(front_reader().feed(frame(record))) == [record]


@pytest.mark.parametrize(
    "data",
    [
        LENGTH.pack(MAX_FRAME_BYTES + 1),
        LENGTH.pack(3) + b"abc",
        LENGTH.pack(1) + b"\x80",
    ],
    ids=["too long", "no message", "no tag"],
)
def test_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(EngineError):
        list(reader_in_engine().feed(data))
