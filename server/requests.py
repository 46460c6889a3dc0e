"""The requests that are inside the server, from the door to their last byte. Knows no gRPC.

A request that is still being tokenised is unknown to the engine; here it is known, so that its id
is taken and it can be aborted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from ..engine.errors import DuplicateRequest, RequestCancelled

Result = TypeVar("Result")


class RequestTable:
    """Ids of live requests, and what each is doing before the engine has it."""

    def __init__(self, num_threads: int) -> None:
        self._live: dict[str, asyncio.Future[object] | None] = {}
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        # Bounded: a burst of long prompts queues here, where it can still be cancelled.
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="text")

    def __len__(self) -> int:
        return len(self._live)

    @contextmanager
    def entered(self, request_id: str) -> Iterator[None]:
        """Raises DuplicateRequest while another request has this id."""
        if request_id in self._live:
            raise DuplicateRequest(f"request {request_id!r} is still live; give each its own id")
        self._live[request_id] = None
        self._is_empty.clear()
        try:
            yield
        finally:
            del self._live[request_id]
            if not self._live:
                self._is_empty.set()

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on a text thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def abortable(self, request_id: str, work: Awaitable[Result]) -> Result:
        """Awaits `work`; RequestCancelled if `abort` names the request meanwhile."""
        future = asyncio.ensure_future(work)
        self._live[request_id] = future  # type: ignore[assignment]
        try:
            await asyncio.wait({future})
        finally:
            self._live[request_id] = None
            was_cancelled = future.cancelled()
            future.cancel()
        if was_cancelled:
            raise RequestCancelled(f"request {request_id!r} was aborted")
        return future.result()

    def abort(self, request_id: str) -> bool:
        """True when the request was found in our hands and is ended."""
        future = self._live.get(request_id)
        return future is not None and future.cancel()

    async def wait_empty(self) -> None:
        await self._is_empty.wait()

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
