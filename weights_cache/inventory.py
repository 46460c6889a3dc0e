"""What a store holds, in one list for people: artefacts and fetched sources, found by name.

Knows the store's own lists; measures and removes nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engine.errors import ConfigError
from .records import SourceRecord
from .store import Store
from .views import view_folder

ARTEFACT, SOURCE = "artefact", "source"
LEAST_PREFIX_CHARS = 4
ABOUT_KEYS = ("source", "architecture", "target")
"""What an artefact says of itself that tells it from others."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One artefact (its name is its key) or one fetched source (its name is its slug)."""

    kind: str
    name: str
    path: Path
    num_bytes: int
    used_at: float
    num_leases: int
    about: str
    """A source as it was given; an artefact's model and target."""
    record: SourceRecord | None = None


def entries(store: Store) -> list[Entry]:
    """What was used last comes first."""
    found = [*_artefacts(store), *_sources(store)]
    return sorted(found, key=lambda entry: (-entry.used_at, entry.name))


def _artefacts(store: Store) -> list[Entry]:
    return [
        Entry(
            ARTEFACT,
            arena.key,
            store.root / "arenas" / arena.key,
            arena.num_bytes,
            arena.used_at,
            arena.num_leases,
            " ".join(arena.about[key] for key in ABOUT_KEYS if arena.about.get(key)),
        )
        for arena in store.arenas()
    ]


def _sources(store: Store) -> list[Entry]:
    return [
        Entry(
            SOURCE,
            source.slug,
            view_folder(store, source.slug),
            source.num_bytes,
            source.used_at,
            source.num_leases,
            source.record.source if source.record else "",
            source.record,
        )
        for source in store.sources()
    ]


def find(found: Sequence[Entry], name: str) -> Entry:
    """By name, by the beginning of a key, or by the source. Raises ConfigError."""
    matches = [entry for entry in found if entry.name == name]
    matches = matches or [entry for entry in found if _may_mean(entry, name)]
    if not matches:
        raise ConfigError(f"NAME is {name!r}: not in the cache; see `pilotlight cache list`")
    if len(matches) > 1:
        names = ", ".join(entry.name for entry in matches[:4])
        raise ConfigError(f"NAME is {name!r}: may mean {names}; give more of it")
    return matches[0]


def _may_mean(entry: Entry, name: str) -> bool:
    if entry.kind == ARTEFACT:
        return len(name) >= LEAST_PREFIX_CHARS and entry.name.startswith(name)
    # The source may have been given without its last slash.
    return name == entry.path.name or (name != "" and name.rstrip("/") == entry.about.rstrip("/"))
