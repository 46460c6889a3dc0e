"""A file system that fails at its k-th call, in one chosen way: the layer under the chaos suite.

A killed process stays dead: every later call of it fails too, so no `finally` can tidy up.
"""

from __future__ import annotations

import enum
import errno
import mmap
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotlight.weights_cache.files import FileSystem


class Killed(BaseException):
    """What `kill -9` is to the code under test: nothing catches it, nothing runs after it."""


class Kind(enum.Enum):
    KILL = enum.auto()
    """After the call; before it is after the one before."""
    POWER_LOSS = enum.auto()
    """Killed, and what was written since the last fsync of a file is zeros."""
    EIO_BEFORE = enum.auto()
    EIO_AFTER = enum.auto()
    """It happened, and the caller is told that it did not."""
    EIO_FROM_NOW = enum.auto()
    ENOSPC = enum.auto()
    ENOSPC_FROM_NOW = enum.auto()
    ENOENT = enum.auto()
    SHORT = enum.auto()
    FLIP = enum.auto()
    """A bit of what is read or written."""
    TRUNCATE = enum.auto()
    """The file loses its end after the call."""
    RUN = enum.auto()
    """No fault: another process does something, whole, before this call."""


KILLS = (Kind.KILL, Kind.POWER_LOSS)
LASTING = (Kind.EIO_FROM_NOW, Kind.ENOSPC_FROM_NOW)
NEED_ROOM = {"pwrite", "fallocate", "mkdir", "rename", "create"}
CHANGE = NEED_ROOM | {"unlink", "rmdir", "ftruncate", "touch"}
MOVE_BYTES = {"pread", "pread_into", "pwrite"}
HIT_BY = {
    Kind.KILL: CHANGE,
    Kind.POWER_LOSS: {"pwrite", "rename"},
    Kind.EIO_AFTER: CHANGE,
    Kind.ENOSPC: NEED_ROOM,
    Kind.ENOSPC_FROM_NOW: NEED_ROOM,
    Kind.SHORT: MOVE_BYTES,
    Kind.FLIP: MOVE_BYTES,
    Kind.TRUNCATE: {"pwrite", "fsync", "fallocate"},
}
"""The calls to which it makes a difference; all calls for the others."""


def is_hit_by(kind: Kind, call: str) -> bool:
    return kind not in HIT_BY or call in HIT_BY[kind]


@dataclass
class Fault:
    kind: Kind
    at: int
    """The number of the call that it hits, from 0 on."""
    seed: int = 0
    run: Callable[[], None] = lambda: None


class QuickFileSystem(FileSystem):
    """Nothing fails, nothing waits for a disk: for the processes that are not under test."""

    fault: Fault | None = None
    is_dead = False
    num_injected = num_run = 0

    def fsync(self, descriptor: int) -> None:
        pass

    def fallocate(self, descriptor: int, num_bytes: int) -> None:
        self.ftruncate(descriptor, num_bytes)

    def close_all(self) -> None:
        pass


class FaultyFileSystem(QuickFileSystem):
    """One process's. `num_injected` counts the calls that were made to fail."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault = fault
        self.calls: list[str] = []
        self.num_injected = self.num_run = 0
        self.is_dead = False
        self._randoms = random.Random(fault.seed if fault else 0)
        self._paths: dict[int, Path] = {}
        self._unsynced: dict[Path, list[tuple[int, int]]] = {}

    # ---- calls -------------------------------------------------------------------------------

    def open(self, path: Path, flags: int) -> int:
        name = "create" if flags & os.O_CREAT else "open"
        descriptor: int = self._call(name, lambda: super(FaultyFileSystem, self).open(path, flags))
        self._paths[descriptor] = path
        return descriptor

    def close(self, descriptor: int) -> None:
        """Not failed: no caller of close() has anything to lose. A dead process closes all."""
        if descriptor in self._paths:
            del self._paths[descriptor]
            super().close(descriptor)

    def pread(self, descriptor: int, num_bytes: int, offset: int) -> bytes:
        num_bytes = self._shortened("pread", num_bytes)
        data: bytes = self._call(
            "pread", lambda: super(FaultyFileSystem, self).pread(descriptor, num_bytes, offset)
        )
        return self._flipped("pread", data)

    def pread_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        buffer = buffer[: self._shortened("pread_into", len(buffer))]
        call = super().pread_into
        num: int = self._call("pread_into", lambda: call(descriptor, buffer, offset))
        buffer[:num] = self._flipped("pread_into", bytes(buffer[:num]))
        return num

    def pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        piece = self._flipped("pwrite", bytes(data[: self._shortened("pwrite", len(data))]))
        path = self._paths.get(descriptor, Path())
        self._unsynced.setdefault(path, []).append((offset, len(piece)))
        call = super().pwrite
        return int(self._call("pwrite", lambda: call(descriptor, piece, offset), descriptor))

    def fsync(self, descriptor: int) -> None:
        """Without the disk: a test's power loss is known beforehand."""

        def sync() -> None:
            self._unsynced.pop(self._paths.get(descriptor, Path()), None)

        self._call("fsync", sync, descriptor)

    def ftruncate(self, descriptor: int, num_bytes: int) -> None:
        call = super().ftruncate
        self._call("ftruncate", lambda: call(descriptor, num_bytes))

    def fallocate(self, descriptor: int, num_bytes: int) -> None:
        """Without the room, which would only cost time."""
        call = super().ftruncate
        self._call("fallocate", lambda: call(descriptor, num_bytes), descriptor)

    def map(self, descriptor: int, num_bytes: int, offset: int) -> mmap.mmap:
        call = super().map
        mapping: mmap.mmap = self._call("map", lambda: call(descriptor, num_bytes, offset))
        return mapping

    def populate(self, mapping: mmap.mmap, offset: int, num_bytes: int) -> bool:
        call = super().populate
        return bool(self._call("populate", lambda: call(mapping, offset, num_bytes)))

    def stat(self, path: Path) -> os.stat_result:
        call = super().stat
        found: os.stat_result = self._call("stat", lambda: call(path))
        return found

    def fstat(self, descriptor: int) -> os.stat_result:
        call = super().fstat
        found: os.stat_result = self._call("fstat", lambda: call(descriptor))
        return found

    def list(self, folder: Path) -> Any:
        call = super().list
        return self._call("list", lambda: call(folder))

    def mkdir(self, folder: Path) -> None:
        call = super().mkdir
        self._call("mkdir", lambda: call(folder))

    def rmdir(self, folder: Path) -> None:
        call = super().rmdir
        self._call("rmdir", lambda: call(folder))

    def rename(self, source: Path, target: Path) -> None:
        call = super().rename

        def rename() -> None:
            call(source, target)
            for path in [path for path in self._unsynced if path.is_relative_to(source)]:
                self._unsynced[target / path.relative_to(source)] = self._unsynced.pop(path)

        self._call("rename", rename)

    def unlink(self, path: Path, missing_ok: bool = False) -> None:
        call = super().unlink
        self._call("unlink", lambda: call(path, missing_ok))

    def touch(self, path: Path) -> None:
        call = super().touch
        self._call("touch", lambda: call(path))

    # ---- faults ------------------------------------------------------------------------------

    @property
    def num_calls(self) -> int:
        return len(self.calls)

    @property
    def _is_now(self) -> bool:
        return self.fault is not None and self.num_calls == self.fault.at

    def _call(self, name: str, call: Callable[[], Any], descriptor: int = -1) -> Any:
        if self.is_dead:
            raise Killed
        kind = self._kind(name)
        self.calls.append(name)
        if kind is not None:
            self.num_injected += kind is not Kind.RUN
            self.num_run += kind is Kind.RUN
            self._fail_before(kind)
        result = call()
        if kind is not None:
            self._fail_after(kind, descriptor)
        return result

    def _kind(self, name: str) -> Kind | None:
        if self.fault is None:
            return None
        is_hit = self._is_now or (self.fault.kind in LASTING and self.num_calls > self.fault.at)
        is_hit = is_hit and is_hit_by(self.fault.kind, name)
        return self.fault.kind if is_hit else None

    def _fail_before(self, kind: Kind) -> None:
        if kind in (Kind.EIO_BEFORE, Kind.EIO_FROM_NOW):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if kind in (Kind.ENOSPC, Kind.ENOSPC_FROM_NOW):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if kind is Kind.ENOENT:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if kind is Kind.RUN and self.fault is not None:
            self.fault.run()

    def _fail_after(self, kind: Kind, descriptor: int) -> None:
        if kind is Kind.TRUNCATE and descriptor >= 0:
            num_bytes = os.fstat(descriptor).st_size
            os.ftruncate(descriptor, self._randoms.randrange(num_bytes) if num_bytes else 0)
        if kind is Kind.KILL:
            self._die()
        if kind is Kind.POWER_LOSS:
            self._lose_power()
            self._die()
        if kind is Kind.EIO_AFTER:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _shortened(self, name: str, num_bytes: int) -> int:
        is_short = self._is_now and self.fault is not None and self.fault.kind is Kind.SHORT
        return self._randoms.randrange(1, num_bytes + 1) if is_short and num_bytes else num_bytes

    def _flipped(self, name: str, data: bytes) -> bytes:
        """Asked before a write and after a read, which was the call before."""
        if self.fault is None or self.fault.kind is not Kind.FLIP or not data:
            return data
        if self.num_calls - (name != "pwrite") != self.fault.at:
            return data
        at, bit = self._randoms.randrange(len(data)), 1 << self._randoms.randrange(8)
        return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]

    def _lose_power(self) -> None:
        for path, spans in self._unsynced.items():
            if path.is_file():
                with path.open("r+b") as file:
                    for offset, num_bytes in spans:
                        file.seek(offset)
                        file.write(bytes(num_bytes))

    def _die(self) -> None:
        self.is_dead = True
        self.close_all()
        raise Killed

    def close_all(self) -> None:
        for descriptor in list(self._paths):
            self.close(descriptor)
