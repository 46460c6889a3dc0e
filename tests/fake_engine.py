"""An engine inside the test's own event loop: the real core and scheduler, no process, no model.

Tokens come from KvCheckingRunner, so they are known in advance (`tokens_alone`). By default it runs
by itself; held, it makes one step at a time, which shows a request in each of its states.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from pilotlight.engine.core import EngineCore
from pilotlight.engine.messages import (
    Abort,
    Boot,
    Failed,
    FromEngine,
    Heartbeat,
    ModelFacts,
    Progress,
    Ready,
    Standby,
    StepRecord,
    Stop,
    Submit,
    ToEngine,
    Unload,
)
from pilotlight.engine.scheduler import Scheduler
from pilotlight.tests.fake_runner import KvCheckingRunner

PHASES = ("check", "import_torch", "load_weights", "warm")


class FakeEngine:
    """Launches links; `link` is the newest. Sizes are those of every engine launched."""

    def __init__(
        self,
        *,
        vocab_size: int = 200,
        num_blocks: int = 256,
        block_size: int = 4,
        context_len: int = 256,
        max_num_seqs: int = 8,
        max_batched_tokens: int = 64,
        eos_token_ids: tuple[int, ...] = (),
        speculative: str = "off",
        boots: bool = True,
        is_held: bool = False,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.facts = ModelFacts(
            architecture="FakeForCausalLM",
            vocab_size=vocab_size,
            num_layers=1,
            num_parameters=10,
            weight_bytes=20,
            context_len=context_len,
            eos_token_ids=list(eos_token_ids),
            device="cpu",
            dtype="float32",
            block_size=block_size,
            num_blocks=num_blocks,
            kv_cache_bytes=num_blocks * block_size,
            kv_cache_dtype="int8",
            kernels={"linear": "fake"},
        )
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.speculative = speculative
        self.boots = boots
        """False: it stays in its first phase until `become_ready` or `stand_by`."""
        self.clock = clock
        """Of what it says about its boots."""
        self.is_held = is_held
        self.links: list[FakeLink] = []

    async def launch(self) -> FakeLink:
        self.links.append(FakeLink(self, pid=1000 + len(self.links)))
        return self.links[-1]

    @property
    def link(self) -> FakeLink:
        return self.links[-1]


class FakeLink:
    """One fake engine process."""

    def __init__(self, engine: FakeEngine, pid: int) -> None:
        facts = engine.facts
        self.pid = pid
        self.spawned_s = engine.clock()
        self.is_held = engine.is_held
        self.received: list[ToEngine] = []
        self._engine = engine
        self._outbox: asyncio.Queue[FromEngine | None] = asyncio.Queue()
        self._exit_reason = ""
        self._ended = asyncio.Event()
        self._has_work = asyncio.Event()
        scheduler = Scheduler(
            num_blocks=facts.num_blocks,
            block_size=facts.block_size,
            context_len=facts.context_len,
            eos_token_ids=facts.eos_token_ids,
            max_num_seqs=engine.max_num_seqs,
            max_batched_tokens=engine.max_batched_tokens,
            speculative=engine.speculative,
        )
        runner = KvCheckingRunner(facts.num_blocks, facts.block_size, facts.vocab_size)
        self.core = EngineCore(scheduler, runner)
        self._task = asyncio.create_task(self._run())

    # ---- the client's side -------------------------------------------------------------------

    def send(self, message: ToEngine) -> None:
        self.received.append(message)
        match message:
            case Boot(config=config):
                phase = PHASES[0] if config.model else "import_torch"
                self.say(Progress(phase, self._engine.clock()))
                if self._engine.boots:
                    self.become_ready() if config.model else self.stand_by()
            case Unload():
                self.core.abort(self.core.live_request_ids())
                self.step()
                if self._engine.boots:
                    self.stand_by()
            case Submit():
                self.core.submit(message)
            case Abort():
                self.core.abort(message.request_ids, message.index)
            case Stop():
                self.end("exit code 0")
        self._has_work.set()

    async def messages(self) -> AsyncIterator[FromEngine]:
        while (message := await self._outbox.get()) is not None:
            yield message

    def kill(self) -> None:
        self.end("killed by SIGKILL")

    async def wait(self) -> str:
        await self._ended.wait()
        return self._exit_reason

    # ---- the test's side ---------------------------------------------------------------------

    def say(self, message: FromEngine) -> None:
        self._outbox.put_nowait(message)

    def become_ready(self) -> None:
        for phase in PHASES[1:]:
            self.say(Progress(phase, self._engine.clock(), 20, 20))
        self.say(Ready(self._engine.facts, self._engine.clock()))

    def stand_by(self, reason: str = "") -> None:
        """There without a model; with a reason, because it could not be loaded."""
        self.say(Standby(self._engine.clock(), reason))

    def fail(self, reason: str, is_setup: bool) -> None:
        self.say(Failed(reason, is_setup))
        self.end("exit code 2")

    def end(self, reason: str) -> None:
        """The process is gone; its channel ends after what was said before."""
        if not self._ended.is_set():
            self._exit_reason = reason
            self._ended.set()
            self._outbox.put_nowait(None)
            self._task.cancel()

    def step(self) -> StepRecord | None:
        """One step of a held engine; its record is on its way to the client."""
        record = self.core.step()
        if record is not None:
            self.say(record)
        return record

    def release(self) -> None:
        """A held engine runs by itself from now on."""
        self.is_held = False
        self._has_work.set()

    def beat(self, pulse: int = 0) -> None:
        statistics = self.core.statistics()
        live = self.core.live_request_ids()
        self.say(Heartbeat(statistics.num_steps, pulse, len(live), 0.0, live, statistics))

    async def _run(self) -> None:
        while True:
            await self._has_work.wait()
            while not self.is_held and self.core.has_work:
                self.step()
                await asyncio.sleep(0)
            self._has_work.clear()
