"""gRPC servers on ports of their own: bound at construction, or PortInUse. Knows no services."""

from __future__ import annotations

import socket

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection

from ..engine.errors import PortInUse
from .limits import MAX_MESSAGE_BYTES, MAX_METADATA_BYTES

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


def address_of(host: str, port: int) -> str:
    """As gRPC and urls spell it: an IPv6 address is in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class GrpcPort:
    """A server that is bound to `host`; 0 takes a free port. `flag` is what a refusal names."""

    def __init__(self, host: str, port: int, flag: str) -> None:
        self._check_bindable(host, port, flag)
        self.server = grpc.aio.server(options=GRPC_OPTIONS)
        address = address_of(host, port)
        try:
            self.number = self.server.add_insecure_port(address)
        except RuntimeError as error:
            raise PortInUse(f"{flag} {port}: cannot bind {address}") from error

    def reflect(self, *service_names: str) -> None:
        """Lets clients ask for these services' descriptions."""
        names = (*service_names, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)

    async def start(self) -> None:
        await self.server.start()

    async def stop(self, grace_s: float) -> None:
        await self.server.stop(grace_s)

    @staticmethod
    def _check_bindable(host: str, port: int, flag: str) -> None:
        """Raises PortInUse. gRPC would find out too, but only after it has logged its own error."""
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            way_out = "choose another, or 0 for a free one"
            raise PortInUse(f"{flag} {port}: cannot bind {host}: {error}; {way_out}") from error
