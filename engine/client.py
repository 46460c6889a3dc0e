"""The front's handle on the engine: submit, stream, cancel, watch; and one engine after another.

Knows the channel's messages and asyncio; knows no gRPC, no text and no torch.

    launch -> Boot -> Progress … Ready -> StepRecord, Heartbeat …   -> end of the channel
                                 or Standby -> Boot … Unload …           |
                                                                         |
       ^---------- after a pause, if the policy restarts ---------------- +--> FAILED / STOPPED
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from msgspec.structs import replace

from . import boot_record
from .board import Board
from .config import EngineConfig, SupervisionPolicy
from .errors import DuplicateRequest, NotReady
from .launch import EngineLink, Launch, launch_process
from .messages import (
    Abort,
    Beside,
    Boot,
    Failed,
    FromEngine,
    Heartbeat,
    Located,
    Output,
    Progress,
    Ready,
    Standby,
    StepRecord,
    Stop,
    Submit,
    Unload,
)  # fmt: skip
from .model_switch import ModelSwitch, Order, check_order
from .status import EngineState, EngineStatus, PhaseSpan
from .streams import OutputStream
from .watchdog import Watchdog

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 3.0
UNLOAD_TIMEOUT_S = 30.0
"""An engine that is silent for longer while it should unload is taken for stalled."""
LOST = "the engine process ended"
UNLOADED = "the model was unloaded"
LASTING_BOOT_S = 60.0
"""An engine that was ready for this long is a new chance: earlier restarts are forgotten."""


class EngineClient:
    """Runs one engine at a time. All methods belong to one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        policy: SupervisionPolicy,
        *,
        launch: Launch = launch_process,
        clock: Callable[[], float] = time.monotonic,
        started_s: float | None = None,
    ) -> None:
        self._switch = ModelSwitch(config)
        self._policy = policy
        self._launch = launch
        self._clock = clock
        self._started_s = clock() if started_s is None else started_s
        self._board = Board(EngineStatus())
        self._step_listeners: list[Callable[[StepRecord], None]] = []
        self._streams: dict[str, OutputStream] = {}
        self._link: EngineLink | None = None
        self._watchdog: Watchdog | None = None
        self._failure: Failed | None = None
        self._stop_asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # ---- what others see ---------------------------------------------------------------------

    @property
    def status(self) -> EngineStatus:
        return self._board.value

    def status_changes(self) -> AsyncIterator[EngineStatus]:
        """The present status, then each newer one."""
        return self._board.values()

    def listen_steps(self, listener: Callable[[StepRecord], None]) -> None:
        """Calls `listener` with every step record, before its outputs are delivered."""
        self._step_listeners.append(listener)

    @property
    def heartbeat_age_s(self) -> float:
        return self._watchdog.heartbeat_age_s(self._clock()) if self._watchdog else 0.0

    @property
    def pid(self) -> int:
        """0 while there is no engine process."""
        return self._link.pid if self._link else 0

    @property
    def failed_setup(self) -> bool:
        """The engine ended because of what the operator asked for: exit code 2, no restart."""
        return self._failure is not None and self._failure.is_setup

    @property
    def num_live_requests(self) -> int:
        return len(self._streams)

    def note_beside(self, name: str, lane: str, began_s: float, ended_s: float) -> None:
        """A stretch of work beside the boot's own line, by time.monotonic()."""
        span = PhaseSpan(name, began_s - self._started_s, ended_s - began_s, lane)
        self._show(boot_record.beside(self.status, span))

    def note_late_text(self, at_s: float) -> None:
        """The front had read the model's text at `at_s`, by time.monotonic(): a phase if last."""
        self._show(boot_record.read_text(self.status, at_s - self._started_s))

    # ---- requests ----------------------------------------------------------------------------

    def submit(self, submit: Submit) -> OutputStream:
        """Hands a request over. Raises NotReady or DuplicateRequest."""
        if self.status.state is not EngineState.READY or self._link is None:
            raise NotReady(f"the model is not ready: {self.status.state}")
        if submit.request_id in self._streams:
            raise DuplicateRequest(f"request {submit.request_id!r} is still live")
        stream = OutputStream(submit.request_id, submit.sampling.n, self._abort)
        self._streams[submit.request_id] = stream
        self._link.send(submit)
        return stream

    def abort(self, request_ids: list[str]) -> dict[str, bool]:
        """Ends requests; their streams get terminal records. Says which ones were live."""
        found = {request_id: request_id in self._streams for request_id in request_ids}
        live = [request_id for request_id, is_live in found.items() if is_live]
        if live and self._link:
            self._link.send(Abort(live))
        return found

    def _abort(self, abort: Abort) -> None:
        """A stream gave up one sample, or all of it: then nothing is delivered any more."""
        if abort.index is None:
            for request_id in abort.request_ids:
                self._streams.pop(request_id, None)
        if self._link:
            self._link.send(abort)

    # ---- models come and go ------------------------------------------------------------------

    async def load(self, config: EngineConfig) -> None:
        """From STANDBY to READY. Raises WrongState, SetupError (on standby again) or EngineDied."""
        check_order(Order.LOAD, self.status.state)
        await self._load(self._switch.load(config))

    async def wake(self) -> None:
        """From SLEEPING to READY, as `load`; where the model is ready there is nothing to do."""
        check_order(Order.WAKE, self.status.state)
        if self.status.state is EngineState.SLEEPING:
            await self._load(self._switch.wake())

    async def unload(self) -> None:
        """To STANDBY; live streams end as aborted. Raises WrongState or EngineDied."""
        await self._rest(Order.UNLOAD)

    async def sleep(self) -> None:
        """To SLEEPING: as `unload`, but `wake` brings the same model back."""
        await self._rest(Order.SLEEP)

    async def _load(self, done: asyncio.Future[None]) -> None:
        self._show(boot_record.asked_to_load(self.status, self._elapsed_s()))
        self._send(Boot(self._switch.wanted))
        await asyncio.shield(done)

    async def _rest(self, order: Order) -> None:
        check_order(order, self.status.state)
        forgets = order is Order.UNLOAD
        if self.status.state is not EngineState.READY:  # the engine holds no model
            if forgets:
                self._switch.forget()
            self._show(replace(self.status, state=self._switch.resting))
            return
        done = self._switch.unload(forgets)
        self._watchdog = Watchdog(self._clock(), UNLOAD_TIMEOUT_S, UNLOAD_TIMEOUT_S)
        self._show(boot_record.asked_to_unload(self.status, self._elapsed_s()))
        self._send(Unload())
        await asyncio.shield(done)

    def _send(self, message: Boot | Unload) -> None:
        if self._link:
            self._link.send(message)

    # ---- life --------------------------------------------------------------------------------

    def fail_setup(self, reason: str) -> None:
        """The front found a mistake of the operator's: ends the engine, and none follows."""
        self._failure = Failed(reason, is_setup=True)
        if self._link:
            self._link.kill()

    def start(self) -> None:
        """Begins to launch and supervise; returns at once."""
        self._task = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def wait_ended(self) -> EngineStatus:
        """Waits until there will be no engine any more: STOPPED or FAILED."""
        if self._task is not None:
            await asyncio.shield(self._task)
        return self.status

    async def stop(self) -> None:
        """Ends the engine, by force if it does not follow. Live streams fail."""
        self._stop_asked.set()
        if self._task is None:
            self._show(replace(self.status, state=EngineState.STOPPED))
            return
        if self._link:
            self._link.send(Stop())
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._task), STOP_TIMEOUT_S)
        if self._link:
            self._link.kill()
        await self._task

    async def _supervise(self) -> None:
        num_in_a_row = 0
        while True:
            began_s = self._clock()
            reason = await self._run_one_engine()
            if self._stop_asked.is_set():
                return self._end(EngineState.STOPPED, reason)
            logger.error("the engine ended: %s", reason)
            num_in_a_row = 0 if self._clock() - began_s > LASTING_BOOT_S else num_in_a_row
            if not self._may_restart(num_in_a_row):
                return self._end(EngineState.FAILED, reason)
            self._fail_streams(reason)
            await self._pause(self._policy.restart_backoff_s * 2**num_in_a_row)
            if self._stop_asked.is_set():
                return self._end(EngineState.STOPPED, reason)
            num_in_a_row += 1

    def _may_restart(self, num_in_a_row: int) -> bool:
        policy = self._policy
        may_help = not self.failed_setup and num_in_a_row < policy.max_restarts
        return policy.restarts and may_help

    async def _pause(self, seconds: float) -> None:
        self._show(replace(self.status, num_restarts=self.status.num_restarts + 1))
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop_asked.wait(), seconds)

    def _end(self, state: EngineState, reason: str) -> None:
        self._show(replace(self.status, state=state, reason=reason))
        self._fail_streams(reason)
        self._switch.over(reason)

    def _fail_streams(self, reason: str) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(reason)

    async def _run_one_engine(self) -> str:
        """From launch to the end of the process; returns why it ended."""
        self._watchdog = None
        if not self.failed_setup:
            self._failure = None
        link = self._link = await self._launch()
        self._show(boot_record.launched(self.status, link.spawned_s - self._started_s))
        if self.failed_setup or self._stop_asked.is_set():  # meanwhile: it is not to boot
            link.kill()
        link.send(Boot(self._switch.wanted))
        judge = asyncio.create_task(self._judge(link), name="engine-judge")
        try:
            async for message in link.messages():
                self._hear(message)
        finally:
            judge.cancel()
            # The channel is closed but a process may hang on: none may hold the device.
            link.kill()
            self._link = self._watchdog = None
            is_stalled = self.status.state is EngineState.STALLED
            stall_reason = self.status.reason if is_stalled else ""
            self._show(replace(self.status, state=EngineState.STARTING, reason=LOST, facts=None))
            exit_reason = await link.wait()
            reason = self._failure.reason if self._failure else stall_reason or exit_reason
            self._switch.lost(reason)
        return reason

    # ---- messages ----------------------------------------------------------------------------

    def _hear(self, message: FromEngine) -> None:
        if self._watchdog is not None:
            self._watchdog.hear(message, self._clock())
        match message:
            case StepRecord():
                self._take_record(message)
            case Heartbeat():
                self._reconcile(message)
                self._show(replace(self.status, statistics=message.statistics))
            case Progress(at_s=at_s):
                at_s -= self._started_s
                self._show(boot_record.advanced(self.status, message, at_s))
            case Located():
                self._show(boot_record.located(self.status, message))
            case Beside(name=name, lane=lane, began_s=began_s, ended_s=ended_s):
                self.note_beside(name, lane, began_s, ended_s)
            case Ready(at_s=at_s):
                policy = self._policy
                self._watchdog = Watchdog(
                    self._clock(), policy.heartbeat_timeout_s, policy.progress_timeout_s
                )
                self._show(boot_record.ready(self.status, message, at_s - self._started_s))
                self._switch.ready()
            case Standby():
                self._rested(message)
            case Failed():
                self._failure = message

    def _rested(self, message: Standby) -> None:
        self._watchdog = None  # without a model an engine has nothing to say
        self._switch.stood_by(message.reason)
        at_s = message.at_s - self._started_s
        self._show(boot_record.stood_by(self.status, message, self._switch.resting, at_s))
        self._fail_streams(UNLOADED)

    def _take_record(self, record: StepRecord) -> None:
        for listener in self._step_listeners:
            listener(record)
        for output in record.outputs:
            self._deliver(output)

    def _deliver(self, output: Output) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return
        stream.deliver(output)
        if stream.is_ended:
            del self._streams[output.request_id]

    def _reconcile(self, heartbeat: Heartbeat) -> None:
        """Ends what the engine works on and nobody here waits for. None should ever be found."""
        unknown = [i for i in heartbeat.live_request_ids if i not in self._streams]
        if unknown and self._link:
            self._link.send(Abort(unknown))

    # ---- stalls ------------------------------------------------------------------------------

    async def _judge(self, link: EngineLink) -> None:
        healthy_s = self._clock()
        while True:
            await asyncio.sleep(self._policy.judge_interval_s)
            now_s = self._clock()
            reason = self._watchdog.stall_reason(now_s) if self._watchdog else ""
            self._show_stall(reason)
            healthy_s = healthy_s if reason else now_s
            if now_s - healthy_s > self._policy.stall_kill_s:
                logger.error("killing the engine: %s", reason)
                return link.kill()

    def _show_stall(self, reason: str) -> None:
        state = self.status.state
        if state is EngineState.READY and reason:
            logger.error("the engine is stalled: %s", reason)
            self._show(replace(self.status, state=EngineState.STALLED, reason=reason))
        elif state is EngineState.STALLED and not reason:
            logger.warning("the engine moves again")
            self._show(replace(self.status, state=EngineState.READY, reason=""))

    def _show(self, status: EngineStatus) -> None:
        if status != self.status:
            self._board.show(status)

    def _elapsed_s(self) -> float:
        return self._clock() - self._started_s
