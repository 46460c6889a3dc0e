"""The calls to the file system that the store makes: nothing else in it touches a file.

One thin method for each call, so that a test can put a file system underneath that fails. Below
them, what is built of them. Knows paths and bytes; nothing of what they mean.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import pages

READ_BYTES = 1 << 20


class FileSystem:
    """Every method may raise OSError; reads and writes may be short, as the system's own may."""

    # ---- calls -------------------------------------------------------------------------------

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o644)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def pread(self, descriptor: int, num_bytes: int, offset: int) -> bytes:
        return os.pread(descriptor, num_bytes, offset)

    def pread_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(descriptor, [buffer], offset)

    def pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        return os.pwrite(descriptor, data, offset)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def ftruncate(self, descriptor: int, num_bytes: int) -> None:
        os.ftruncate(descriptor, num_bytes)

    def fallocate(self, descriptor: int, num_bytes: int) -> None:
        """The file has this length, and the disk has room for all of it."""
        os.posix_fallocate(descriptor, 0, num_bytes)

    def map(self, descriptor: int, num_bytes: int, offset: int) -> mmap.mmap:
        return mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_READ, offset=offset)

    def populate(self, mapping: mmap.mmap, offset: int, num_bytes: int) -> bool:
        """Reads and maps pages. False: this system has no call that does so without a SIGBUS."""
        return pages.populate(mapping, offset, num_bytes)

    def stat(self, path: Path) -> os.stat_result:
        return path.stat()

    def fstat(self, descriptor: int) -> os.stat_result:
        return os.fstat(descriptor)

    def list(self, folder: Path) -> list[str]:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries)

    def mkdir(self, folder: Path) -> None:
        folder.mkdir()

    def rmdir(self, folder: Path) -> None:
        folder.rmdir()

    def rename(self, source: Path, target: Path) -> None:
        """A folder may be renamed onto an empty folder, never onto a full one."""
        source.rename(target)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def unlink(self, path: Path, missing_ok: bool = False) -> None:
        path.unlink(missing_ok)

    def touch(self, path: Path) -> None:
        """Changed now, by the file system's own clock. The file must be there."""
        os.utime(path)

    def is_writable(self, folder: Path) -> bool:
        return os.access(folder, os.W_OK | os.X_OK)

    def free_bytes(self, path: Path) -> int:
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    # ---- built of them -----------------------------------------------------------------------

    @contextmanager
    def opened(self, path: Path, flags: int) -> Iterator[int]:
        descriptor = self.open(path, flags)
        try:
            yield descriptor
        finally:
            self.close(descriptor)

    def read(self, path: Path) -> bytes:
        """All of a small file."""
        pieces: list[bytes] = []
        with self.opened(path, os.O_RDONLY) as descriptor:
            while piece := self.pread(descriptor, READ_BYTES, sum(map(len, pieces))):
                pieces.append(piece)
        return b"".join(pieces)

    def read_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        """Fills the buffer as far as the file goes; returns how far that was."""
        done = 0
        while done < len(buffer):
            num = self.pread_into(descriptor, buffer[done:], offset + done)
            if num == 0:
                break
            done += num
        return done

    def write_all(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        rest = memoryview(data)
        while len(rest):
            num = self.pwrite(descriptor, rest, offset)
            if num == 0:
                raise OSError(errno.EIO, "the file system takes no more bytes and says no reason")
            rest, offset = rest[num:], offset + num

    def write_atomically(self, path: Path, data: bytes) -> None:
        """The file has its old content or its new one, also after the power went."""
        aside = path.with_name(f"{path.name}.{os.urandom(4).hex()}{ASIDE_SUFFIX}")
        try:
            with self.opened(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
                self.write_all(descriptor, data, 0)
                self.fsync(descriptor)
            self.rename(aside, path)
        except OSError:
            with suppress(OSError):
                self.unlink(aside, missing_ok=True)
            raise
        self.sync_folder(path.parent)

    def sync_folder(self, folder: Path) -> None:
        """What was renamed into the folder stays there when the power goes."""
        with self.opened(folder, os.O_RDONLY) as descriptor:
            self.fsync(descriptor)

    def make_folder(self, folder: Path) -> None:
        with suppress(FileExistsError):
            self.mkdir(folder)

    def make_folders(self, folder: Path) -> None:
        """And those above it."""
        try:
            self.make_folder(folder)
        except FileNotFoundError:
            self.make_folders(folder.parent)
            self.make_folder(folder)

    def remove_tree(self, path: Path) -> None:
        """A file, or a folder and what is in it. What is gone already is no error."""
        try:
            names = self.list(path)
        except NotADirectoryError:
            return self.unlink(path, missing_ok=True)
        except FileNotFoundError:
            return None
        for name in names:
            self.remove_tree(path / name)
        with suppress(FileNotFoundError):
            self.rmdir(path)
        return None


ASIDE_SUFFIX = ".aside"
"""Ends the name of a file that was written aside and not yet renamed."""
