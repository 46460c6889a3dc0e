"""`pilotlight serve`: binds the ports, starts the engine, and lives until told to drain.

Knows the order of a boot and of an end. torch is never imported in this process.

    ports bound -> health answers -> engine adopted -> … -> READY -> SIGTERM -> drained -> exit 0
                               with --standby: … -> STANDBY -> LoadModel -> READY
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from contextlib import suppress

import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ..engine.client import EngineClient
from ..engine.errors import PilotlightError, SetupError
from ..engine.launch import EngineLink, Launch, launch_process, linked
from ..engine.logs import log_json_lines
from ..engine.model_place import shown
from ..engine.spawn import Spawned
from ..engine.status import EngineState
from ..proto import inference_pb2_grpc as pb_grpc
from .admin import ADMIN_HOST, admin_port
from .admission import Admission, Pace
from .config import ServeConfig
from .generation import Services
from .inference import Inference
from .lifecycle import SERVICE_NAME, Lifecycle
from .metrics import EngineCollector, Metrics
from .model_host import ModelHost
from .model_text import ModelText
from .ops import LoopPulse, OpsApp, OpsServer
from .ports import GrpcPort, address_of
from .requests import RequestTable
from .terminal import follow_boot
from .timeline import startup_json

logger = logging.getLogger(__name__)

EXIT_DRAINED, EXIT_ENGINE_FAILED, EXIT_SETUP = 0, 1, 2
LOOP_BEAT_S = 0.5
FRONT = "front"
"""The lane of what this process does while the engine boots."""
LAST_WORDS_S = 2.0
"""What handlers get to write their last status once the engine is gone."""


class Server:
    """One data port, one ops port, perhaps an admin port; one engine."""

    def __init__(
        self, config: ServeConfig, started_s: float, launch: Launch = launch_process
    ) -> None:
        self._config = config
        self.engine = EngineClient(
            config.engine(),
            config.policy(),
            launch=launch,
            started_s=started_s,
        )
        self.text = ModelText(config.served_name)
        self.lifecycle = Lifecycle(self.engine, started_s, lambda: self.text.is_loaded)
        self._host = ModelHost(config, self.engine, self.text, self.lifecycle)
        self._metrics = Metrics()
        pace = Pace()
        self._admission = Admission(
            config.max_queued_requests or 4 * config.max_num_seqs,
            config.max_queued_tokens or (1 << 62),
            pace,
            self._metrics.refuse,
        )
        self.requests = RequestTable(num_threads=max(1, min(4, os.cpu_count() or 1)))
        self._loop_pulse = LoopPulse()
        self.engine.listen_steps(pace.hear)
        self.engine.listen_steps(self._metrics.hear)
        self._bind()

    def _bind(self) -> None:
        """All ports, or PortInUse; nothing is served yet."""
        config, lifecycle, engine = self._config, self.lifecycle, self.engine
        collector = EngineCollector(engine, lifecycle, lambda: self.text.name)
        self._metrics.registry.register(collector)
        app = OpsApp(
            self._metrics.registry,
            self._loop_pulse,
            lambda: (lifecycle.is_ready, lifecycle.state_name),
            lambda: startup_json(engine.status, lifecycle.state_name, lifecycle.elapsed_s),
        )
        self._data = GrpcPort(config.host, config.port, "--port")
        self._add_services()
        self._admin = admin_port(config.admin_port, self._host) if config.admin_port >= 0 else None
        self._ops = OpsServer(config.ops_host or config.host, config.ops_port, app)

    def _add_services(self) -> None:
        services = Services(
            self.engine,
            self.lifecycle,
            self._admission,
            self.requests,
            self._metrics,
            self.text,
        )
        inference = Inference(services, self._config)
        pb_grpc.add_InferenceServicer_to_server(inference, self._data.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.lifecycle.health, self._data.server)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        self._data.reflect(SERVICE_NAME, health_name)

    @property
    def port(self) -> int:
        return self._data.number

    @property
    def admin_port(self) -> int:
        """-1 where there is none."""
        return self._admin.number if self._admin else -1

    @property
    def ops_port(self) -> int:
        return self._ops.port

    # ---- life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """From here on all ports answer; the model comes when it comes."""
        await self.lifecycle.publish_liveness()
        await self._data.start()
        if self._admin:
            await self._admin.start()
        self._ops.start()
        self.lifecycle.opened_ports()
        self.engine.start()
        self._tasks = [
            asyncio.create_task(self._host.read_first_text()),
            asyncio.create_task(self.lifecycle.follow_engine()),
            asyncio.create_task(self._beat()),
        ]

    async def _beat(self) -> None:
        while True:
            self._loop_pulse.beat()
            self._settle_token_quota()
            await asyncio.sleep(LOOP_BEAT_S)

    def _settle_token_quota(self) -> None:
        """By default, waiting prompts may fill the KV cache once."""
        facts = self.engine.status.facts
        if facts is not None and not self._config.max_queued_tokens:
            self._admission.max_prompt_tokens = facts.num_blocks * facts.block_size

    async def drain(self) -> None:
        """Readiness off, door shut, running streams finish or the time is over."""
        began_s = time.monotonic()
        self.lifecycle.begin_drain()
        await self.lifecycle.publish_readiness()
        await asyncio.sleep(self._config.drain_lag)
        self.lifecycle.close()
        logger.info("draining %d requests", len(self.requests))
        with suppress(TimeoutError):
            await asyncio.wait_for(self.requests.wait_empty(), self._config.drain_timeout)
        fields = {"drain_s": round(time.monotonic() - began_s, 3), "num_cut": len(self.requests)}
        logger.info("drained", extra={"fields": fields})

    async def stop(self) -> None:
        """Ends the engine, lets handlers say their last words, closes the ports."""
        await self.engine.stop()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.requests.wait_empty(), LAST_WORDS_S)
        for task in self._tasks:
            task.cancel()
        await self._data.stop(grace_s=0.2)
        if self._admin:
            await self._admin.stop(grace_s=0.2)
        self._ops.stop()
        self.requests.close()


async def serve(config: ServeConfig, started_s: float, spawned: Spawned, imported_s: float) -> int:
    server = Server(config, started_s, first_engine(spawned))
    server.engine.note_beside("import_front", FRONT, spawned.at_s, imported_s)
    terminate = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, number, terminate)
    await server.start()
    server.engine.note_beside("open_ports", FRONT, imported_s, time.monotonic())
    announce(server, config)
    boot = asyncio.create_task(follow_boot(server.engine)) if sys.stderr.isatty() else None
    ended = asyncio.create_task(server.engine.wait_ended())
    asked = asyncio.create_task(terminate.wait())
    await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
    if boot is not None:
        boot.cancel()
    if asked.done():
        await server.drain()
    status = server.engine.status
    failed = status.state is EngineState.FAILED
    await server.stop()
    if not failed:
        return EXIT_DRAINED
    print(f"pilotlight: {status.reason}", file=sys.stderr)
    return EXIT_SETUP if server.engine.failed_setup else EXIT_ENGINE_FAILED


def first_engine(spawned: Spawned) -> Launch:
    """Launches what was spawned before this module was imported; later engines are new ones."""
    waiting = [spawned]

    async def launch() -> EngineLink:
        return await (linked(waiting.pop()) if waiting else launch_process())

    return launch


def _on_signal(number: signal.Signals, terminate: asyncio.Event) -> None:
    """The first asks for a drain; the second means now."""
    if terminate.is_set():
        os._exit(128 + number)
    terminate.set()


def announce(server: Server, config: ServeConfig) -> None:
    fields = {
        "target": address_of(config.host, server.port),
        "ops": f"http://{address_of(config.ops_host or config.host, server.ops_port)}",
        **({"admin": f"{ADMIN_HOST}:{server.admin_port}"} if config.admin_port >= 0 else {}),
        "model": "" if config.standby else shown(config.model),
        "pid": os.getpid(),
        "ports_open_s": round(server.lifecycle.ports_open_s, 3),
    }
    if sys.stderr.isatty():
        print(f"pilotlight: gRPC on {fields['target']}, ops on {fields['ops']}", file=sys.stderr)
    logger.info("ports are open", extra={"fields": fields})


def run(config: ServeConfig, started_s: float, spawned: Spawned, imported_s: float) -> int:
    """Runs a server to its end; returns the exit code. Mistakes cost one line on stderr.

    `imported_s`: time.monotonic() when all that a front needs had been imported.
    """
    level = "error" if sys.stderr.isatty() and config.log_level == "info" else config.log_level
    log_json_lines("front", level)
    try:
        return uvloop.run(serve(config, started_s, spawned, imported_s))
    except SetupError as error:
        print(f"pilotlight: {error}", file=sys.stderr)
        return EXIT_SETUP
    except PilotlightError as error:
        print(f"pilotlight: {error}", file=sys.stderr)
        return EXIT_ENGINE_FAILED
