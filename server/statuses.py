"""The one table from our errors to gRPC statuses with google.rpc details. Knows no requests.

Every status carries ErrorInfo (reason, domain); the rest depends on who has to act: BadRequest
names a field, RetryInfo a pause, QuotaFailure a limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2
from grpc_status import rpc_status

from ..engine import errors

DOMAIN = "pilotlight"
MAX_TEXT_BYTES = 600
"""Of each text in a status. Statuses travel as metadata, of which clients take 8 KiB in all: one
that quoted a caller's long value in full would never arrive."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a caller gets."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, bytes | str], ...]


CODES: dict[type[Exception], tuple[grpc.StatusCode, str]] = {
    errors.InvalidField: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
    errors.UnknownModel: (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL"),
    errors.DuplicateRequest: (grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_REQUEST"),
    errors.DeadlineExpired: (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXPIRED"),
    errors.RequestCancelled: (grpc.StatusCode.CANCELLED, "REQUEST_CANCELLED"),
    errors.WrongState: (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE"),
    errors.SetupError: (grpc.StatusCode.INVALID_ARGUMENT, "CANNOT_LOAD"),
    errors.QueueFull: (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    errors.NotReady: (grpc.StatusCode.UNAVAILABLE, "NOT_READY"),
    errors.Draining: (grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    errors.EngineDied: (grpc.StatusCode.UNAVAILABLE, "ENGINE_DIED"),
    errors.RowFailed: (grpc.StatusCode.INTERNAL, "ROW_FAILED"),
}


def status_of(error: Exception) -> Status:
    """What we raise on purpose by the table; anything else is INTERNAL and keeps its secrets."""
    for kind in type(error).__mro__:
        if kind in CODES:
            code, reason = CODES[kind]
            return _status(_code_of(error, code), reason, _bounded(str(error)), error)
    message = "an internal error; the server's log has the details"
    return _status(grpc.StatusCode.INTERNAL, "INTERNAL", message, error)


def _code_of(error: Exception, code: grpc.StatusCode) -> grpc.StatusCode:
    """Once a caller has tokens, sending the request again would not be the same request."""
    has_sent = isinstance(error, errors.EngineDied) and error.num_tokens_sent > 0
    return grpc.StatusCode.ABORTED if has_sent else code


def _status(code: grpc.StatusCode, reason: str, message: str, error: Exception) -> Status:
    number = int(code.value[0])
    packed = [_packed(detail) for detail in _details(reason, message, error)]
    status = rpc_status.to_status(status_pb2.Status(code=number, message=message, details=packed))
    return Status(code, message, tuple(status.trailing_metadata))


def _details(reason: str, message: str, error: Exception) -> list[Message]:
    info = details.ErrorInfo(reason=reason, domain=DOMAIN)
    found: list[Message] = [info]
    match error:
        case errors.InvalidField():
            violation = details.BadRequest.FieldViolation(
                field=error.field, description=message, reason=reason
            )
            limit = _bounded(error.limit)
            info.metadata.update(field=error.field, value=error.value, limit=limit)
            found.append(details.BadRequest(field_violations=[violation]))
        case errors.WrongState():
            info.metadata.update(state=error.state, allowed=",".join(error.allowed))
        case errors.QueueFull():
            violation_of = details.QuotaFailure.Violation(subject=error.quota, description=message)
            found.append(details.QuotaFailure(violations=[violation_of]))
        case errors.EngineDied():
            info.metadata["tokens_sent"] = str(error.num_tokens_sent)
    if isinstance(error, errors.CapacityError):
        found.append(details.RetryInfo(retry_delay=_duration(error.retry_after_s)))
    return found


def _bounded(text: str) -> str:
    data = text.encode(errors="replace")
    is_long = len(data) > MAX_TEXT_BYTES
    return data[:MAX_TEXT_BYTES].decode(errors="ignore") + "..." * is_long


def _packed(detail: Message) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed


def _duration(seconds: float) -> Duration:
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
