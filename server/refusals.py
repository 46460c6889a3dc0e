"""How a method of any of our gRPC services ends with an error. Knows statuses, no requests.

A handler that is cancelled (client gone, deadline over) re-raises: grpc.aio leaks the call's
operations otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from ..engine.errors import EngineDied, InvalidField, PilotlightError
from .statuses import status_of

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


@asynccontextmanager
async def refusing(context: Context) -> AsyncIterator[None]:
    """What is raised inside becomes the call's status."""
    try:
        yield
    except Exception as error:
        await abort(context, error)


async def abort(context: Context, error: Exception) -> None:
    """Ends the call with the error's status; raises."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, PilotlightError):
        logger.exception("a request failed for a reason of our own", exc_info=error)
    elif not isinstance(error, InvalidField | EngineDied):
        logger.info("refused: %s", error)
    status = status_of(error)
    await context.abort(status.code, status.message, status.trailing_metadata)
