"""Room on the disk: what was used least recently goes, from a high down to a low watermark.

The policy alone. What is removed, and what cannot be because it is in use, the caller says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

NEVER_USED = float("-inf")


@dataclass(frozen=True, slots=True)
class Item:
    """Something that may go: `name` tells it from all others, `remove` is false if it is in use.

    `used_at` orders; it is compared with other items' only, never with a clock.
    """

    name: str
    used_at: float
    remove: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection did, as names like `arenas/<key>`, `sources/<slug>`, `partial/<name>`."""

    num_bytes_before: int
    num_bytes_after: int
    removed: tuple[str, ...] = ()
    kept_in_use: tuple[str, ...] = ()


def make_room(
    items: Iterable[Item], measure: Callable[[], int], high_bytes: int, low_bytes: int
) -> Collected:
    """Nothing goes up to `high_bytes`; beyond it, one after the other down to `low_bytes`."""
    before = now = measure()
    removed: list[str] = []
    kept: list[str] = []
    if before > high_bytes:
        for item in sorted(items, key=lambda item: (item.used_at, item.name)):
            if now <= low_bytes:
                break
            (removed if item.remove() else kept).append(item.name)
            now = measure()
    return Collected(before, now, tuple(removed), tuple(kept))
