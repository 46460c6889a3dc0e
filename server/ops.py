"""The ops port: /metrics, /livez, /readyz and /startup over plain HTTP. Knows no requests.

A thread of its own, so that it also answers while the event loop is stuck: then /livez says so.
"""

from __future__ import annotations

import errno
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from ..engine.errors import PortInUse

LOOP_TIMEOUT_S = 10.0
STOP_POLL_S = 0.05
"""How often the thread looks whether to stop: the end of the server waits for it."""


class LoopPulse:
    """When the event loop last ran: written by the loop, read by the ops thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._beat_s = clock()

    def beat(self) -> None:
        self._beat_s = self._clock()

    @property
    def age_s(self) -> float:
        return self._clock() - self._beat_s


class OpsApp:
    """The WSGI application. `state` returns (is ready, state's name), `startup` the timeline."""

    def __init__(
        self,
        registry: CollectorRegistry,
        pulse: LoopPulse,
        state: Callable[[], tuple[bool, str]],
        startup: Callable[[], dict[str, Any]],
    ) -> None:
        self._metrics = make_wsgi_app(registry)
        self._pulse = pulse
        self._state = state
        self._startup = startup

    def __call__(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"].rstrip("/")
        if path == "/metrics":
            pages: Iterable[bytes] = self._metrics(environ, start)
            return pages
        status, body = self._answer(path)
        start(status, [("Content-Type", "application/json"), ("Cache-Control", "no-store")])
        return [json.dumps(body).encode() + b"\n"]

    def _answer(self, path: str) -> tuple[str, dict[str, Any]]:
        is_ready, name = self._state()
        match path:
            case "/livez":
                is_alive = self._pulse.age_s < LOOP_TIMEOUT_S
                return _ok(is_alive), {"alive": is_alive, "loop_age_s": round(self._pulse.age_s, 3)}
            case "/readyz":
                return _ok(is_ready), {"ready": is_ready, "state": name}
            case "/startup":
                return "200 OK", self._startup()
        paths = ["/metrics", "/livez", "/readyz", "/startup"]
        return "404 Not Found", {"error": f"no {path or '/'} here", "paths": paths}


def _ok(holds: bool) -> str:
    return "200 OK" if holds else "503 Service Unavailable"


class _Handler(WSGIRequestHandler):
    timeout = 10

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every second: they are no news."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    # Two servers on one port would share it by chance; and no reverse lookup of our own name.
    allow_reuse_port = False

    def server_bind(self) -> None:
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


class OpsServer:
    """Bound at construction, or PortInUse; answers from `start` to `stop`."""

    def __init__(self, host: str, port: int, app: OpsApp) -> None:
        try:
            kind = _Server6 if ":" in host else _Server
            self._server = make_server(host, port, app, kind, _Handler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise PortInUse(f"--ops-port {port}: cannot bind {host}: {error}") from error
            message = f"--ops-port {port} on {host} is in use; choose another, or 0 for a free one"
            raise PortInUse(message) from error

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    def start(self) -> None:
        serve = partial(self._server.serve_forever, poll_interval=STOP_POLL_S)
        threading.Thread(target=serve, name="ops", daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
