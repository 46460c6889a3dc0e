"""The engine's loop with a line that the test writes: models come, go, and are refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pilotlight.engine import service as service_module
from pilotlight.engine import unload
from pilotlight.engine.boot import Booted
from pilotlight.engine.config import EngineConfig
from pilotlight.engine.core import EngineCore
from pilotlight.engine.errors import CheckpointError, EngineError, SetupError
from pilotlight.engine.found_weights import FoundWeights
from pilotlight.engine.messages import (
    Boot,
    FinishReason,
    FromEngine,
    Heartbeat,
    Progress,
    Ready,
    Standby,
    StepRecord,
    Submit,
    ToEngine,
    Unload,
)
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.engine.scheduler import Scheduler
from pilotlight.engine.service import Service
from pilotlight.tests.fake_engine import FakeEngine
from pilotlight.tests.fake_runner import KvCheckingRunner, tokens_alone

VOCAB_SIZE, NUM_BLOCKS, BLOCK_SIZE, CONTEXT_LEN = 200, 64, 4, 256
STAND_BY, LOAD = Boot(EngineConfig(model="")), Boot(EngineConfig(model="good"))
REFUSED = Boot(EngineConfig(model="bad"))
LONG = Submit("a", [1, 2, 3], SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True))
SHORT = Submit("b", [1, 2, 3], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))


class EndOfScript(Exception):
    """The line has nothing more to give."""


class ScriptedLine:
    """Gives one message at a time, a new one only when the engine has no work or after `steps`."""

    def __init__(self, *messages: ToEngine | Callable[[], None]) -> None:
        self.sent: list[FromEngine] = []
        self._script = list(messages)

    def send(self, message: FromEngine) -> None:
        if not isinstance(message, Heartbeat):
            self.sent.append(message)

    def take(self, block: bool) -> list[ToEngine]:
        if not block and not (self._script and isinstance(self._script[0], Unload)):
            return []
        if not self._script:
            raise EndOfScript
        entry = self._script.pop(0)
        if callable(entry):
            entry()
            return []
        return [entry]


class NoTorch:
    """In place of the import that every engine begins with."""

    def wait(self) -> list[Any]:
        return []


NO_TORCH: Any = NoTorch()


class Models:
    """What `boot` finds: "good" can be loaded, anything else is refused."""

    def __init__(self, max_in_flight: int) -> None:
        self.max_in_flight = max_in_flight
        self.newest: weakref.ref[EngineCore] | None = None
        self.num_given_back = 0

    def boot(self, config: EngineConfig, report: Any, pulse: Any, torch_import: Any) -> Booted:
        report("check", 0, 0, "")
        if config.model != "good":
            raise CheckpointError(f"{config.model} is not a folder")
        scheduler = Scheduler(
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            context_len=CONTEXT_LEN,
            eos_token_ids=[],
            max_num_seqs=4,
            max_batched_tokens=64,
        )
        runner = KvCheckingRunner(NUM_BLOCKS, BLOCK_SIZE, VOCAB_SIZE)
        core = EngineCore(scheduler, runner, max_in_flight=self.max_in_flight)
        self.newest = weakref.ref(core)
        no_files: Any = None
        return Booted(
            core,
            FakeEngine().facts,
            FoundWeights(Path("model"), no_files, no_files, no_files, "fake"),
        )

    def is_there(self) -> bool:
        return self.newest is not None and self.newest() is not None


@pytest.fixture(params=[1, 2], ids=["one step in flight", "two"])
def models(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Models:
    models = Models(request.param)

    def count_given_back() -> None:
        models.num_given_back += 1
        gc.unfreeze()
        gc.collect()

    monkeypatch.setattr(service_module, "stand_by", lambda torch_import, report: None)
    monkeypatch.setattr(service_module, "boot", models.boot)
    monkeypatch.setattr(service_module, "give_memory_back", count_given_back)
    return models


def _serve(*script: ToEngine | Callable[[], None]) -> list[FromEngine]:
    """What the engine said, its heartbeats left out."""
    line = ScriptedLine(*script)
    with pytest.raises(EndOfScript):
        Service(line, NO_TORCH).serve()
    return line.sent


def _kinds(sent: list[FromEngine]) -> list[type]:
    return [type(message) for message in sent if not isinstance(message, Progress)]


def _tokens(sent: list[FromEngine]) -> list[int]:
    records = [message for message in sent if isinstance(message, StepRecord)]
    return [i for record in records for output in record.outputs for i in output.token_ids]


def test_without_a_model_the_engine_stands_by(models: Models) -> None:
    [*_, standby] = _serve(STAND_BY)
    assert isinstance(standby, Standby)
    assert (standby.reason, standby.at_s > 0.0) == ("", True)


def test_a_model_is_loaded_from_standby_and_serves(models: Models) -> None:
    sent = _serve(STAND_BY, LOAD, SHORT)
    assert _kinds(sent)[:2] == [Standby, Ready]
    assert _tokens(sent) == tokens_alone([1, 2, 3], 4, VOCAB_SIZE)


def test_unload_ends_what_is_live_and_then_stands_by(models: Models) -> None:
    sent = _serve(LOAD, LONG, Unload())
    *_, last_record, standby = sent
    assert isinstance(standby, Standby)
    assert isinstance(last_record, StepRecord)
    assert [o.finish_reason for o in last_record.outputs] == [FinishReason.ABORTED]
    assert len(_tokens(sent)) < 200
    assert models.num_given_back == 1


def test_after_an_unload_nothing_holds_the_model(models: Models) -> None:
    seen: list[bool] = []
    _serve(
        LOAD,
        SHORT,
        lambda: seen.append(models.is_there()),
        Unload(),
        lambda: seen.append(models.is_there()),
    )
    assert seen == [True, False]


def test_another_model_follows_an_unload(models: Models) -> None:
    sent = _serve(LOAD, Unload(), LOAD, SHORT)
    assert _kinds(sent)[:3] == [Ready, Standby, Ready]
    assert _tokens(sent) == tokens_alone([1, 2, 3], 4, VOCAB_SIZE)


@pytest.mark.parametrize("before", [(STAND_BY,), (LOAD, Unload())])
def test_a_model_that_is_refused_does_not_end_an_engine_that_stood_by(
    models: Models, before: tuple[ToEngine, ...]
) -> None:
    sent = _serve(*before, REFUSED, LOAD)
    *_, refusal, ready = [m for m in sent if not isinstance(m, Progress)]
    assert isinstance(refusal, Standby)
    assert refusal.reason == "bad is not a folder"
    assert isinstance(ready, Ready)


def test_a_model_that_is_refused_at_the_first_boot_ends_the_engine(models: Models) -> None:
    with pytest.raises(SetupError, match="bad is not a folder"):
        Service(ScriptedLine(REFUSED), NO_TORCH).serve()


def test_a_second_model_beside_the_first_is_an_error_of_ours(models: Models) -> None:
    with pytest.raises(EngineError, match="while a model is loaded"):
        Service(ScriptedLine(LOAD, LOAD), NO_TORCH).serve()


def test_what_the_load_froze_is_collected_when_memory_is_given_back() -> None:
    class Node:
        """Holds itself: only the collector can free it."""

        def __init__(self) -> None:
            self.me = self

    node = Node()
    alive = weakref.ref(node)
    gc.freeze()
    del node
    gc.collect()
    assert alive() is not None, "frozen: out of the collector's sight"
    unload.give_memory_back()
    assert alive() is None
