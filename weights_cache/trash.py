"""Deleting so that nobody loses what he has open: `trash/<folder>~<name>~<owner>`.

    in use? -> rename into the trash -> in use after all? then back, else delete

A reader takes its lease before it opens; so whoever opened the object in its place is seen at the
second look, and whoever comes later misses it. One owner alone decides on an entry; an entry whose
owner is gone is taken over by renaming it, which one of many succeeds in. Knows places and names;
what "in use" means, it asks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .files import FileSystem
from .leases import OwnedFiles
from .liveness import Life, Owner

logger = logging.getLogger(__name__)

InUse = Callable[[Path], bool]
"""Asked with the object's own place. Raises OSError where it cannot be known."""

CONDEMNED = ".condemned"
"""Ends the name of an entry that never comes back: its bytes are bad, or replaced."""


class Trash:
    """`root` is the store's."""

    def __init__(self, owned: OwnedFiles, root: Path, is_in_use: InUse) -> None:
        self._files: FileSystem = owned.files
        self._processes = owned.processes
        self._watch = owned.watch
        self._root = root
        self._folder = root / "trash"
        self._is_in_use_now = is_in_use

    def throw(self, place: Path) -> bool:
        """Deletes the object at `place` unless it is in use. Raises OSError; nothing is lost."""
        if self._is_in_use(place):
            return False
        return self._throw(place, "")

    def condemn(self, place: Path) -> None:
        """The object is gone from its place now, and from the disk when nobody uses it."""
        self._throw(place, CONDEMNED)

    def empty(self) -> None:
        """Decides on everything whose owner is gone."""
        for name in self._files.list(self._folder):
            with suppress(OSError):
                self._take_over(self._folder / name)

    def bring_back(self, place: Path) -> None:
        """If its thrower was killed in between and it is in use, it is in its place again."""
        begin = self._entry_name(place, "")
        for name in self._files.list(self._folder):
            if name.startswith(begin) and not name.endswith(CONDEMNED):
                with suppress(OSError):
                    self._take_over(self._folder / name)

    def _throw(self, place: Path, end: str) -> bool:
        owner = self._processes.new_owner()
        entry = self._folder / (self._entry_name(place, str(owner)) + end)
        try:
            self._files.rename(place, entry)
            return self._decide(entry, place)
        except FileNotFoundError:
            return True
        finally:
            self._processes.end(owner)

    def _take_over(self, entry: Path) -> None:
        parts = entry.name.removesuffix(CONDEMNED).split("~")
        before = Owner.parse(parts[-1])
        if len(parts) != 3 or before is None:
            self._files.remove_tree(entry)
            return
        if not self._is_over(entry, before):
            return
        owner = self._processes.new_owner()
        end = CONDEMNED if entry.name.endswith(CONDEMNED) else ""
        taken = self._folder / f"{parts[0]}~{parts[1]}~{owner}{end}"
        try:
            self._files.rename(entry, taken)
            self._decide(taken, self._root / parts[0] / parts[1])
        finally:
            self._processes.end(owner)

    def _is_over(self, entry: Path, owner: Owner) -> bool:
        """Deciding takes moments: whoever lives and has not decided will not."""
        is_dead = self._processes.life(owner) is Life.DEAD
        return is_dead or self._watch.is_still(str(entry), None)

    def _decide(self, entry: Path, place: Path) -> bool:
        """True: deleted."""
        if self._is_in_use(place):
            if not entry.name.endswith(CONDEMNED):
                with suppress(OSError):  # a newer one may have its place: then it stays here
                    self._files.rename(entry, place)
            return False
        self._files.remove_tree(entry)
        return True

    def _is_in_use(self, place: Path) -> bool:
        try:
            return self._is_in_use_now(place)
        except OSError as error:
            logger.warning("whether %s is in use cannot be known (%s); it stays", place, error)
            return True

    def _entry_name(self, place: Path, owner: str) -> str:
        return f"{place.parent.name}~{place.name}~{owner}"
