"""Where unfinished artefacts lie: `partial/<name>~<owner>/`, each its owner's alone.

Whoever holds the claim on `name` may take over what an owner left that is certainly dead, by
renaming it. What an owner elsewhere left is thrown away instead: he may be only suspended, and
still writing. Knows folders; nothing of what is made in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .leases import OwnedFiles
from .liveness import Life, Owner
from .single_flight import Claim
from .trash import Trash


class Workplaces:
    """All of a store."""

    def __init__(self, owned: OwnedFiles, folder: Path, trash: Trash) -> None:
        self._files = owned.files
        self._processes = owned.processes
        self._watch = owned.watch
        self._folder = folder
        self._trash = trash

    def take(self, name: str, claim: Claim) -> Path:
        """A folder of one's own, with what a dead one left, where there is something."""
        mine = self._folder / f"{name}~{claim.owner}"
        is_taken = False
        for place, owner in list(self.left(name)):
            life = self._processes.life(owner)
            if life is Life.DEAD and not is_taken:
                self._files.rename(place, mine)
                is_taken = True
            elif life is not Life.ALIVE:
                self._trash.condemn(place)
        if not is_taken:
            self._files.mkdir(mine)
        return mine

    def discard(self, name: str) -> bool:
        """Throws away what is left of `name`; False: at some of it somebody may still be."""
        is_all = True
        for place, owner in list(self.left(name)):
            if self._processes.life(owner) is Life.ALIVE and not self._is_still(place):
                is_all = False
            else:
                self._trash.condemn(place)
        return is_all

    def _is_still(self, place: Path) -> bool:
        """For whoever holds the claim: its owner lives, but gave the claim up or lost it."""
        times = []
        for name in self._files.list(place):
            found = self._files.stat(place / name)
            times.append((name, found.st_size, found.st_mtime_ns))
        return self._watch.is_still(str(place), times)

    def left(self, name: str) -> Iterator[tuple[Path, Owner]]:
        """Those of `name`, whoever's they are."""
        for entry in self._files.list(self._folder):
            of, _, owner_name = entry.partition("~")
            owner = Owner.parse(owner_name)
            if of == name and owner is not None:
                yield self._folder / entry, owner

    def names(self) -> set[str]:
        entries = self._files.list(self._folder)
        return {entry.partition("~")[0] for entry in entries if "~" in entry}
