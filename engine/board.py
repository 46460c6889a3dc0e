"""One value that changes, and many who follow it. Knows nothing about the value."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Board(Generic[Value]):
    """Shows the newest value; those who are slow skip what came between."""

    def __init__(self, value: Value) -> None:
        self._value = value
        self._version = 0
        self._changed = asyncio.Event()

    @property
    def value(self) -> Value:
        return self._value

    def show(self, value: Value) -> None:
        self._value = value
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def values(self) -> AsyncIterator[Value]:
        """The present value, then each newer one."""
        seen = -1
        while True:
            if seen == self._version:
                await self._changed.wait()
            seen = self._version
            yield self._value
