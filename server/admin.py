"""The methods of pilotlight.v1.Admin, and their port. Knows gRPC; the work is ModelHost's.

The port is bound to loopback and nowhere else: whoever reaches it may name files to read.
"""

from __future__ import annotations

from typing import Any

from ..engine.status import EngineState
from ..proto import admin_pb2 as pb
from ..proto import admin_pb2_grpc as pb_grpc
from ..proto.inference_pb2 import Phase
from .model_host import ModelHost
from .ports import GrpcPort
from .refusals import Context, refusing

ADMIN_HOST = "127.0.0.1"
ADMIN_SERVICE = pb.DESCRIPTOR.services_by_name["Admin"].full_name


def admin_port(number: int, host: ModelHost) -> GrpcPort:
    """Bound, or PortInUse; answers once it is started."""
    port = GrpcPort(ADMIN_HOST, number, "--admin-port")
    pb_grpc.add_AdminServicer_to_server(Admin(host), port.server)
    port.reflect(ADMIN_SERVICE)
    return port


class Admin(pb_grpc.AdminServicer):
    """One per server. Every order is answered when it is done."""

    def __init__(self, host: ModelHost) -> None:
        self._host = host

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.AdminResponse:
        async with refusing(context):
            await self._host.load(_options(request))
        return self._answer()

    async def UnloadModel(
        self, request: pb.UnloadModelRequest, context: Context
    ) -> pb.AdminResponse:
        async with refusing(context):
            await self._host.unload()
        return self._answer()

    async def Sleep(self, request: pb.SleepRequest, context: Context) -> pb.AdminResponse:
        async with refusing(context):
            await self._host.sleep()
        return self._answer()

    async def Wake(self, request: pb.WakeRequest, context: Context) -> pb.AdminResponse:
        async with refusing(context):
            await self._host.wake()
        return self._answer()

    def _answer(self) -> pb.AdminResponse:
        status, lifecycle = self._host.status, self._host.lifecycle
        is_ready = status.state is EngineState.READY
        return pb.AdminResponse(
            state=lifecycle.state,
            ready_s=lifecycle.ready_after_s if is_ready else 0.0,
            phases=[
                Phase(name=p.name, started_s=p.started_s, duration_s=p.duration_s)
                for p in status.phases
            ],
        )


def _options(request: pb.LoadModelRequest) -> dict[str, Any]:
    """Of ServeConfig: what the request says; the rest is the command line's."""
    texts = {"model": request.model, "model_name": request.model_name}
    options: dict[str, Any] = {name: text for name, text in texts.items() if text}
    for name in ("max_model_len", "dtype", "kv_cache_bytes"):
        if request.HasField(name):
            options[name] = getattr(request, name)
    return options
