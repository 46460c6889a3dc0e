"""What an engine process does between its first message and its last: boot, step, unload, boot.

Knows messages, the core and the boot; knows no sockets and no process.
"""

from __future__ import annotations

import gc
import os
import time
from typing import NoReturn, Protocol

from .boot import Booted, TorchImport, boot, stand_by
from .config import EngineConfig
from .errors import EngineError
from .heartbeat import Heart, Pulse
from .messages import (
    Abort,
    Boot,
    FromEngine,
    Progress,
    Ready,
    Standby,
    StepRecord,
    Stop,
    Submit,
    ToEngine,
    Unload,
)  # fmt: skip

PROGRESS_INTERVAL_S = 0.05


class Line(Protocol):
    """The way to the front."""

    def send(self, message: FromEngine) -> None: ...

    def take(self, block: bool) -> list[ToEngine]: ...


class Report:
    """Passes a boot's progress on; of many byte counts within a moment only the first and last."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._phase = ""
        self._sent_s = 0.0

    def __call__(self, phase: str, bytes_done: int, bytes_total: int, detail: str) -> None:
        now_s = time.monotonic()
        is_news = phase != self._phase or bytes_done == bytes_total
        if is_news or now_s - self._sent_s >= PROGRESS_INTERVAL_S:
            self._phase, self._sent_s = phase, now_s
            self._line.send(Progress(phase, now_s, bytes_done, bytes_total, detail))


class Service:
    """One engine: with a model (`_model`) or on standby."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._torch = TorchImport()
        self._model: Booted | None = None
        self._heart: Heart | None = None
        self._pulse = Pulse()

    def serve(self) -> NoReturn:
        """The loop: take what arrived, compute one batch, tell what came out."""
        while True:
            core = self._model.core if self._model else None
            has_work = core is not None and core.has_work
            for message in self._line.take(block=not has_work):
                self._obey(message)
            if self._model is not None:
                self._step(self._model)

    def _step(self, model: Booted) -> None:
        record = model.core.step()
        if record is not None:
            self._line.send(record)

    def _obey(self, message: ToEngine) -> None:
        match message:
            case Boot(config=config):
                self._boot(config)
            case Unload():
                self._unload()
            case Submit() if self._model:
                self._model.core.submit(message)
            case Abort(request_ids=request_ids, index=index) if self._model:
                self._model.core.abort(request_ids, index)
            case Stop():
                os._exit(0)

    # ---- models come and go ------------------------------------------------------------------

    def _boot(self, config: EngineConfig) -> None:
        """Raises SetupError or EngineError: an engine that cannot load ends."""
        if self._model is not None:
            raise EngineError("a Boot message while a model is loaded")
        report = Report(self._line)
        if not config.model:
            stand_by(self._torch, report)
            self._line.send(Standby(time.monotonic()))
            return
        self._model = boot(config, report, self._pulse, self._torch)
        # What lives now lives until the next unload: keep the collector from walking it.
        gc.collect()
        gc.freeze()
        self._line.send(Ready(self._model.facts, time.monotonic()))
        self._heart = Heart(
            self._model.core, self._pulse, config.heartbeat_interval_s, self._line.send
        )
        self._heart.start()

    def _unload(self) -> None:
        """The front has ended what was live; what is left here ends with its own record."""
        if self._model is not None and self._heart is not None:
            self._heart.stop()
            core = self._model.core
            core.abort(core.live_request_ids())
            self._tell_last(core.step())
            self._model = self._heart = None
            gc.unfreeze()
            gc.collect()
        self._line.send(Standby(time.monotonic()))

    def _tell_last(self, record: StepRecord | None) -> None:
        if record is not None:
            self._line.send(record)
