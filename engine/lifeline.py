"""An engine process from its first message to its end.

Knows the channel and how this process ends; what it does in between is `engine/service.py`.
asyncio, gRPC and text are unknown here.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import signal
import socket
import threading
from collections.abc import Iterator

from .channel import frame, reader_in_engine
from .end_with_parent import end_with_parent
from .errors import SetupError
from .logs import log_json_lines
from .messages import Failed, FromEngine, Stop, ToEngine
from .service import Service
from .torch_import import TorchImport

logger = logging.getLogger(__name__)


class Channel:
    """This end of the socket. A reader thread fills the inbox; any thread may send."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._send_lock = threading.Lock()
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()

    def start(self) -> None:
        threading.Thread(target=self._read_for_ever, name="inbox", daemon=True).start()

    def send(self, message: FromEngine) -> None:
        data = frame(message)
        with self._send_lock:
            self._sock.sendall(data)

    def take(self, block: bool) -> list[ToEngine]:
        """Everything that has arrived; waits for the first when `block`."""
        messages = [self._inbox.get()] if block else []
        while not self._inbox.empty():
            messages.append(self._inbox.get())
        return messages

    def _read_for_ever(self) -> None:
        for message in self._messages():
            if isinstance(message, Stop):
                break
            self._inbox.put(message)
        # The front is gone or wants us gone. Nobody will read an answer, and a device must not stay
        # occupied: leave at once, whatever other threads do. A load or a fetch may take minutes.
        os._exit(0)

    def _messages(self) -> Iterator[ToEngine]:
        reader = reader_in_engine()
        while data := self._received():
            yield from reader.feed(data)

    def _received(self) -> bytes:
        try:
            return self._sock.recv(1 << 20)
        except OSError:
            return b""


def live(torch_import: TorchImport) -> int:
    """Serves the front until it is gone; returns the exit code."""
    parser = argparse.ArgumentParser(description="Started by `pilotlight serve`; not by hand.")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the front")
    arguments = parser.parse_args()
    log_json_lines("engine", "info")
    outlive_nobody()
    channel = Channel(socket.socket(fileno=arguments.fd))
    channel.start()
    return serve_until_failure(channel, torch_import)


def serve_until_failure(channel: Channel, torch_import: TorchImport) -> int:
    try:
        Service(channel, torch_import).serve()
    except SetupError as error:
        channel.send(Failed(str(error), is_setup=True))
        return 2
    except Exception as error:
        logger.exception("the engine cannot go on")
        channel.send(Failed(f"{type(error).__name__}: {error}", is_setup=False))
        return 1


def outlive_nobody() -> None:
    """Signals of a terminal or a service manager go to the front, which drains and then stops us.

    Should it be killed, the kernel ends this process too, even before the reader thread sees it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()
