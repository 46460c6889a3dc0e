"""The outputs of one request on their way to whoever asked. Knows no channel and no gRPC.

What has not been read yet is handed over together: a slow reader gets fewer, larger pieces, and
costs the engine nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .errors import EngineDied
from .messages import Abort, FinishReason, Output


class OutputStream:
    """Outputs of `num_samples` sequences; ends when each had its terminal record."""

    def __init__(self, request_id: str, num_samples: int, abort: Callable[[Abort], None]) -> None:
        self.request_id = request_id
        self.num_tokens = 0
        """Tokens that arrived, over all samples."""
        self._num_live = num_samples
        self._abort = abort
        self._pending: list[Output] = []
        self._death_reason: str | None = None
        self._news = asyncio.Event()

    @property
    def is_ended(self) -> bool:
        """No more will arrive; what is pending can still be read."""
        return self._num_live == 0 or self._death_reason is not None

    async def next(self) -> list[Output]:
        """All outputs since the last call, at least one; [] after the end. Raises EngineDied."""
        while not self._pending:
            if self._death_reason is not None:
                raise EngineDied(self._death_reason, self.num_tokens)
            if self._num_live == 0:
                return []
            self._news.clear()
            await self._news.wait()
        taken, self._pending = self._pending, []
        return taken

    def cancel(self) -> None:
        """Gives the request up: the engine frees its blocks, nothing more arrives. Idempotent."""
        if not self.is_ended:
            self._num_live = 0
            self._pending = []
            self._abort(Abort([self.request_id]))
            self._news.set()

    def cancel_sample(self, index: int) -> None:
        """Gives one sample up; its terminal record still arrives."""
        if not self.is_ended:
            self._abort(Abort([self.request_id], index))

    # ---- the client's side -------------------------------------------------------------------

    def deliver(self, output: Output) -> None:
        self.num_tokens += len(output.token_ids)
        self._pending.append(output)
        if output.finish_reason is not FinishReason.NONE:
            self._num_live -= 1
        self._news.set()

    def fail(self, reason: str) -> None:
        """The engine is gone."""
        self._death_reason = reason
        self._news.set()
