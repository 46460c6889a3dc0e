"""What an engine process does between its first message and its last: boot, step, unload, boot.

Knows messages, the core and the boot; knows no sockets and no process.
"""

from __future__ import annotations

import gc
import time
from typing import NoReturn, Protocol

from .boot import Booted, boot, stand_by
from .build_artefact import start_behind
from .config import EngineConfig
from .errors import EngineError, SetupError
from .heartbeat import Heart, Pulse
from .last_plan import write_plan
from .logs import set_log_level
from .messages import (
    Abort,
    Beside,
    Boot,
    FromEngine,
    Located,
    Progress,
    Ready,
    Standby,
    Submit,
    ToEngine,
    Unload,
)  # fmt: skip
from .torch_import import TorchImport
from .unload import give_memory_back

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

    def located(self, folder: str) -> None:
        self._line.send(Located(folder))

    def beside(self, name: str, lane: str, began_s: float, ended_s: float) -> None:
        self._line.send(Beside(name, lane, began_s, ended_s))


class Service:
    """One engine: with a model (`_model`) or on standby."""

    def __init__(self, line: Line, torch_import: TorchImport) -> None:
        self._line = line
        self._report = Report(line)
        self._torch = torch_import
        self._has_stood_by = False
        """From then on a model that cannot be loaded is refused; it does not end the engine."""
        self._model: Booted | None = None
        self._heart: Heart | None = None
        self._pulse = Pulse()

    def serve(self) -> NoReturn:
        """The loop: take what arrived, compute one batch, tell what came out."""
        self._report("await_order", 0, 0, "")
        while True:
            for message in self._line.take(block=not self._has_work()):
                self._obey(message)
            self._step()

    # No frame that lives on may hold the model while it is unloaded: its memory would stay.

    def _has_work(self) -> bool:
        return self._model is not None and self._model.core.has_work

    def _step(self) -> None:
        if self._model is not None:
            self._model.weights.check()
        record = self._model.core.step() if self._model else None
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

    # ---- models come and go ------------------------------------------------------------------

    def _boot(self, config: EngineConfig) -> None:
        """Raises EngineError, or SetupError where the engine never stood by: it ends then."""
        if self._model is not None:
            raise EngineError("a Boot message while a model is loaded")
        set_log_level(config.log_level)
        if not config.model:
            stand_by(self._torch, self._report)
            self._stand_by()
        elif self._has_stood_by:
            self._try_load(config)
        else:
            self._load(config)

    def _try_load(self, config: EngineConfig) -> None:
        try:
            self._load(config)
            return
        except SetupError as error:
            reason = str(error)
        # Only now: the error's traceback held whatever had been loaded.
        give_memory_back()
        self._stand_by(reason)

    def _load(self, config: EngineConfig) -> None:
        self._model = boot(config, self._report, self._pulse, self._torch)
        # What lives now lives until the next unload: keep the collector from walking it. The boot's
        # garbage stays with it; to look for it would take longer than the boot's other parts.
        gc.freeze()
        gc.enable()
        self._line.send(Ready(self._model.facts, time.monotonic()))
        self._heart = Heart(
            self._model.core, self._pulse, config.heartbeat_interval_s, self._line.send
        )
        self._heart.start()
        write_plan(self._model.weights, config, self._model.facts)
        start_behind(config, self._model.weights)

    def _unload(self) -> None:
        """What is still live ends with its own record; then weights and cache are gone."""
        if self._heart is not None:
            self._heart.stop()
            self._heart = None
        if self._model is not None:
            self._model.core.abort(self._model.core.live_request_ids())
            while self._has_work():
                self._step()
            self._model.close()
            self._model = None
            give_memory_back()
        self._stand_by()

    def _stand_by(self, reason: str = "") -> None:
        self._has_stood_by = True
        gc.enable()
        self._line.send(Standby(time.monotonic(), reason))
