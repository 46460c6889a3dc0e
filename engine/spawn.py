"""Starts an engine process: the first thing a server does, before it imports its own libraries.

Never forks: gRPC's threads and a forked copy of them do not go together. Knows no asyncio, so that
it can run before that is imported.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

ENGINE_SETTINGS = {
    # Large pages for what an import allocates: fifteen thousand page faults less.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # Threads of torch that wait sleep: spinning takes the cores from those they wait for.
    "OMP_WAIT_POLICY": "PASSIVE",
    # There is no other device's plugin to be looked for among all installed packages.
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
}
"""Of libraries that listen to nothing but the environment. What a user has set stays."""


class Spawned:
    """A process, our end of its channel, and when it was started: time.monotonic()."""

    def __init__(self, process: subprocess.Popen[bytes], ours: socket.socket, at_s: float) -> None:
        self.process = process
        self.socket = ours
        self.at_s = at_s

    def discard(self) -> None:
        """Ends it, if it has not ended."""
        self.process.kill()
        self.process.wait()
        self.socket.close()


def spawn() -> Spawned:
    """Starts `python -m pilotlight.engine.process` with one end of a socket pair.

    It imports torch and waits for its Boot. By subprocess.Popen and not by an event loop: it uses
    vfork, which leaves the fork handlers of gRPC's threads alone, where uvloop forks.
    """
    at_s = time.monotonic()
    ours, theirs = socket.socketpair()
    with theirs:
        module = (sys.executable, "-m", "pilotlight.engine.process")
        process = subprocess.Popen(
            (*module, "--fd", str(theirs.fileno())),
            env=ENGINE_SETTINGS | os.environ,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    return Spawned(process, ours, at_s)
