"""Trying again: how often, how long apart, and reading on from where the bytes ended.

Knows no protocol: a source raises `Transient` for what another try may heal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

from ...engine.errors import SourceError
from .source import SourceChanged, SourceFile

T = TypeVar("T")


class Transient(Exception):
    """One try failed in a way that the next may not; `wait_s` is what the server asked for."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        self.wait_s = wait_s
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Retries:
    """Delays double from `first_delay_s`; `max_failures` counts tries in a row without a byte."""

    max_failures: int = 8
    first_delay_s: float = 0.5
    longest_delay_s: float = 30.0
    sleep: Callable[[float], object] = time.sleep

    def pause(self, num_failures: int, asked_s: float) -> None:
        delay_s = self.first_delay_s * 2 ** (num_failures - 1)
        self.sleep(min(max(delay_s, asked_s), self.longest_delay_s))

    def call(self, what: str, attempt: Callable[[], T]) -> T:
        """The answer of `attempt`, which may raise Transient a few times."""
        num_failures = 0
        while True:
            try:
                return attempt()
            except Transient as error:
                num_failures += 1
                self.judge(what, num_failures, error)

    def judge(self, what: str, num_failures: int, error: Transient) -> None:
        """Waits before the next try, or gives up."""
        if num_failures > self.max_failures:
            raise SourceError(
                f"{what}: {error}, {num_failures} times in a row",
                "the same command later goes on where it stopped",
            ) from error
        self.pause(num_failures, error.wait_s)


def read_on(
    what: str,
    file: SourceFile,
    start: int,
    open_at: Callable[[int], Generator[bytes, None, None]],
    retries: Retries,
) -> Iterator[bytes]:
    """Bytes [start, file.num_bytes) exactly, through as many openings as it takes."""
    at, num_failures = start, 0
    while at < file.num_bytes:
        try:
            with closing(open_at(at)) as pieces:
                for piece in pieces:
                    at += len(piece)
                    if at > file.num_bytes:
                        raise SourceChanged(f"{what} is longer than the {file.num_bytes} B listed")
                    num_failures = 0
                    yield piece
            if at < file.num_bytes:
                raise Transient(f"ended after {at} of {file.num_bytes} B")
        except Transient as error:
            num_failures += 1
            retries.judge(what, num_failures, error)
