"""`pilotlight serve`: binds the ports, starts the engine, and lives until told to drain.

Knows the order of a boot and of an end. torch is never imported in this process.

    ports bound -> health answers -> engine adopted -> … -> READY -> SIGTERM -> drained -> exit 0
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import grpc
import msgspec
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..engine.client import EngineClient
from ..engine.errors import InvalidField, PilotlightError, PortInUse, SetupError
from ..engine.launch import EngineLink, Launch, launch_process, linked
from ..engine.logs import log_json_lines
from ..engine.spawn import Spawned
from ..engine.status import EngineState
from ..proto import inference_pb2_grpc as pb_grpc
from .admission import Admission, Pace
from .config import ServeConfig
from .generation import ModelText, Services
from .inference import Inference
from .lifecycle import SERVICE_NAME, Lifecycle
from .limits import MAX_MESSAGE_BYTES, MAX_METADATA_BYTES, check_number
from .metrics import EngineCollector, Metrics
from .ops import LoopPulse, OpsApp, OpsServer
from .requests import RequestTable
from .terminal import follow_boot
from .text.chat import load_chat_template
from .text.tokenizer import load_tokenizer
from .timeline import startup_json
from .validation import SamplingDefaults

logger = logging.getLogger(__name__)

EXIT_DRAINED, EXIT_ENGINE_FAILED, EXIT_SETUP = 0, 1, 2
LOOP_BEAT_S = 0.5
LAST_WORDS_S = 2.0
"""What handlers get to write their last status once the engine is gone."""

GRPC_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    # Clients that ping through a long prefill are right to: the default ends their connection.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients that vanished without a word are found within a minute.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Two servers on one port would share its connections by chance.
    ("grpc.so_reuseport", 0),
)


class Server:
    """One data port, one ops port, one engine."""

    def __init__(self, config: ServeConfig, started_s: float, launch: Launch | None = None) -> None:
        self._config = config
        self.engine = EngineClient(
            config.engine(),
            config.policy(),
            launch=launch or partial(launch_process, config.log_level),
            started_s=started_s,
        )
        self.text = ModelText()
        self.lifecycle = Lifecycle(self.engine, started_s, lambda: self.text.is_loaded)
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
        """Both ports, or PortInUse; nothing is served yet."""
        config, lifecycle, engine = self._config, self.lifecycle, self.engine
        self._metrics.registry.register(EngineCollector(engine, lifecycle, config.served_name))
        app = OpsApp(
            self._metrics.registry,
            self._loop_pulse,
            lambda: (lifecycle.is_ready, lifecycle.state_name),
            lambda: startup_json(engine.status, lifecycle.state_name, lifecycle.elapsed_s),
        )
        self._ops = OpsServer(config.ops_host or config.host, config.ops_port, app)
        self._grpc = grpc.aio.server(options=GRPC_OPTIONS)
        check_bindable(config.host, config.port)
        address = f"{config.host}:{config.port}"
        try:
            self.port = self._grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise PortInUse(f"--port {config.port}: cannot bind {address}") from error
        self._add_services()

    def _add_services(self) -> None:
        services = Services(
            self._config.served_name,
            self.engine,
            self.lifecycle,
            self._admission,
            self.requests,
            self._metrics,
            self.text,
        )
        inference = Inference(services, self._config)
        pb_grpc.add_InferenceServicer_to_server(inference, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self.lifecycle.health, self._grpc)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection(
            (SERVICE_NAME, health_name, reflection.SERVICE_NAME), self._grpc
        )

    @property
    def ops_port(self) -> int:
        return self._ops.port

    # ---- life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """From here on both ports answer; the model comes when it comes."""
        await self.lifecycle.publish_liveness()
        await self._grpc.start()
        self._ops.start()
        self.engine.start()
        self._tasks = [
            asyncio.create_task(self._load_text()),
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

    async def _load_text(self) -> None:
        folder = Path(self._config.model)
        try:
            self.text.tokenizer = await asyncio.to_thread(load_tokenizer, folder)
            self.text.chat_template = await asyncio.to_thread(load_chat_template, folder)
        except SetupError as error:
            self.engine.fail_setup(str(error))
            return
        self.text.defaults = load_sampling_defaults(folder)
        self.text.is_loaded = True
        await self.lifecycle.text_loaded()

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
        await self._grpc.stop(grace=0.2)
        self._ops.stop()
        self.requests.close()


def check_bindable(host: str, port: int) -> None:
    """Raises PortInUse. gRPC would find out as well, but only after it has logged its own error."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        way_out = "choose another, or 0 for a free one"
        raise PortInUse(f"--port {port}: cannot bind {host}: {error}; {way_out}") from error


def load_sampling_defaults(folder: Path) -> SamplingDefaults:
    """What the model's authors recommend in generation_config.json, if anything usable."""
    path = folder / "generation_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        names = ("temperature", "top_k", "top_p", "repetition_penalty")
        given = {name: found[name] for name in names if found.get(name) is not None}
        defaults = msgspec.convert(given, SamplingDefaults)
        for name in names:
            check_number(f"sampling.{name}", getattr(defaults, name))
        return defaults
    except (OSError, ValueError, AttributeError, InvalidField):
        return SamplingDefaults()


async def serve(config: ServeConfig, started_s: float, spawned: Spawned) -> int:
    server = Server(config, started_s, first_engine(spawned, config.log_level))
    terminate = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, number, terminate)
    await server.start()
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


def first_engine(spawned: Spawned, log_level: str) -> Launch:
    """Launches what was spawned before this module was imported; later engines are new ones."""
    waiting = [spawned]

    async def launch() -> EngineLink:
        return await (linked(waiting.pop()) if waiting else launch_process(log_level))

    return launch


def _on_signal(number: signal.Signals, terminate: asyncio.Event) -> None:
    """The first asks for a drain; the second means now."""
    if terminate.is_set():
        os._exit(128 + number)
    terminate.set()


def announce(server: Server, config: ServeConfig) -> None:
    fields = {
        "target": f"{config.host}:{server.port}",
        "ops": f"http://{config.ops_host or config.host}:{server.ops_port}",
        "model": config.model,
        "pid": os.getpid(),
        "ports_open_s": round(server.lifecycle.elapsed_s, 3),
    }
    if sys.stderr.isatty():
        print(f"pilotlight: gRPC on {fields['target']}, ops on {fields['ops']}", file=sys.stderr)
    logger.info("ports are open", extra={"fields": fields})


def run(config: ServeConfig, started_s: float, spawned: Spawned) -> int:
    """Runs a server to its end; returns the exit code. Mistakes cost one line on stderr."""
    level = "error" if sys.stderr.isatty() and config.log_level == "info" else config.log_level
    log_json_lines("front", level)
    try:
        return uvloop.run(serve(config, started_s, spawned))
    except SetupError as error:
        print(f"pilotlight: {error}", file=sys.stderr)
        return EXIT_SETUP
    except PilotlightError as error:
        print(f"pilotlight: {error}", file=sys.stderr)
        return EXIT_ENGINE_FAILED
    finally:
        spawned.discard()
