"""Brings a source into the store: whole, verified and published, or not at all.

    list -> room on the disk? -> each file: partial, hashed as it passes -> blobs/<sha256>
         -> sources/<slug>.json -> models/<slug>/<name>/

Several files at a time; one process at a time for one source, the others wait for its result.
A fetch that ended in any way is continued by the next one. Knows sources by their protocol alone.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from ..engine.errors import NotEnoughDisk, SourceError
from .disk_errors import WAY_OUT, disk_errors
from .partial import PartialFile
from .records import RecordedFile, SourceRecord, slug_of
from .sources.selection import wanted_files
from .sources.source import Source, SourceChanged, SourceFile
from .store import Store
from .views import is_whole, links_work, make_view, view_folder

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the bytes that are there and the bytes of all; from any thread, one at a time."""

NUM_PARALLEL = 4
MAX_LISTINGS = 3
"""A source that changes under a fetch is listed again; this often, then it is an error."""


class Stopped(Exception):
    """The caller set `stop`, or another file failed: what is there is kept for the next time."""


@dataclass(frozen=True, slots=True)
class FetchedSource:
    """A source in the store. `num_bytes_moved` is what this call brought in."""

    folder: Path
    slug: str
    record: SourceRecord
    num_bytes_moved: int = 0


def fetch(
    source: Source,
    store: Store,
    on_progress: Progress = lambda _done, _total: None,
    stop: threading.Event | None = None,
    num_parallel: int = NUM_PARALLEL,
) -> FetchedSource:
    """The source's files, in the store. Raises SourceError, NotEnoughDisk, Stopped."""
    for _ in range(MAX_LISTINGS - 1):
        try:
            return _Fetch(source, store, on_progress, stop, num_parallel).run()
        except SourceChanged as error:
            logger.warning("%s; listing it again", error)
    return _Fetch(source, store, on_progress, stop, num_parallel).run()


def fetched_before(source: Source, store: Store) -> FetchedSource | None:
    """What an earlier fetch brought in, if all of it is there. Asks nobody."""
    slug = slug_of(source.text, source.short_name)
    record = store.read_record(slug)
    if record is None or not is_whole(store, slug, record):
        return None
    return FetchedSource(view_folder(store, slug), slug, record)


class _Fetch:
    """One listing, and the files that it names."""

    def __init__(
        self,
        source: Source,
        store: Store,
        on_progress: Progress,
        stop: threading.Event | None,
        num_parallel: int,
    ) -> None:
        self._source = source
        self._store = store
        self._on_progress = on_progress
        self._stop = stop or threading.Event()
        self._failed = threading.Event()
        self._num_parallel = num_parallel
        self._lock = threading.Lock()
        self._slug = slug_of(source.text, source.short_name)
        listing = source.list_files()
        self._revision = listing.revision
        self._files = wanted_files(listing, self._read_small, source.text)
        self._num_bytes = sum(file.num_bytes for file in self._files)
        self._num_done = self._num_moved = 0

    def run(self) -> FetchedSource:
        before = self._unchanged()
        if before is not None:
            return before
        with disk_errors(self._store.root), self._store.claim(f"source-{self._slug}"):
            # Another process may have fetched it while this one waited.
            return self._unchanged() or self._fetch_all()

    def _unchanged(self) -> FetchedSource | None:
        before = fetched_before(self._source, self._store)
        if before is None or not before.record.is_of(self._files):
            return None
        with self._store.lease(f"source-{self._slug}"):
            pass  # it counts as used now
        self._report(self._num_bytes)
        return before

    def _fetch_all(self) -> FetchedSource:
        self._check_room()
        files = tuple(self._in_parallel())
        record = SourceRecord(self._source.text, self._revision, files)
        self._store.write_record(self._slug, record)
        folder = make_view(self._store, self._slug, record)
        return FetchedSource(folder, self._slug, record, self._num_moved)

    # ---- room --------------------------------------------------------------------------------

    def _check_room(self) -> None:
        """Before the first byte. Where links are refused, the view needs its own bytes too."""
        missing = [file for file in self._files if self._known_blob(file) is None]
        needed = sum(file.num_bytes - self._num_bytes_partial(file) for file in missing)
        if not links_work(self._store):
            needed += self._num_bytes
        free = self._store.free_bytes()
        if needed > free:
            raise NotEnoughDisk(
                f"{self._store.root} has {free} bytes free, {self._source.text} needs {needed} "
                f"more; {WAY_OUT}"
            )

    def _num_bytes_partial(self, file: SourceFile) -> int:
        try:
            return min(self._store.files.stat(self._partial_path(file)).st_size, file.num_bytes)
        except OSError:
            return 0

    # ---- files -------------------------------------------------------------------------------

    def _in_parallel(self) -> list[RecordedFile]:
        with ThreadPoolExecutor(self._num_parallel, "fetch") as pool:
            futures = [pool.submit(self._one, file) for file in self._files]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            except KeyboardInterrupt:
                # Wakes a source that waits between two tries, if it waits on this event.
                self._stop.set()
                raise
            finally:
                if not all(_succeeded(future) for future in futures):
                    self._failed.set()
        return [future.result() for future in _worst_first(futures)]

    def _one(self, file: SourceFile) -> RecordedFile:
        self._check_stop()
        sha256 = self._known_blob(file)
        if sha256 is None:
            sha256 = self._download(file)
        else:
            self._report(file.num_bytes)
        return RecordedFile(file.name, sha256, file.num_bytes, file.version)

    def _known_blob(self, file: SourceFile) -> str | None:
        """The blob that is this file already: by its digest, or by what was fetched before."""
        sha256 = file.sha256
        if not sha256:
            record = self._store.read_record(self._slug)
            known = record.file(file.name) if record else None
            sha256 = known.sha256 if known and known.is_of(file) else ""
        return sha256 if sha256 and self._store.has_blob(sha256, file.num_bytes) else None

    def _download(self, file: SourceFile) -> str:
        partial = PartialFile(self._store.files, self._partial_path(file), file)
        try:
            is_resumed = partial.resume(self._report) > 0
            self._append_rest(partial, file)
            if file.digest and partial.hashes.published != file.digest and is_resumed:
                # Either the part from before was another content, or what came now is.
                self._restart(partial)
                self._append_rest(partial, file)
            self._check_digest(partial, file)
            partial.sync()
        except SourceChanged:
            self._report(-partial.num_bytes)
            partial.discard()
            raise
        except (SourceError, Stopped):
            partial.save()
            raise
        finally:
            partial.close()
        self._store.publish_blob(partial.path, partial.hashes.sha256)
        partial.forget_journal()
        return partial.hashes.sha256

    def _append_rest(self, partial: PartialFile, file: SourceFile) -> None:
        for piece in self._source.read(file, partial.num_bytes):
            partial.append(piece)
            self._report(len(piece), is_new=True)
            self._check_stop()
        if partial.num_bytes != file.num_bytes:
            raise SourceChanged(f"{file.name} has {partial.num_bytes} B, not {file.num_bytes}")

    def _check_stop(self) -> None:
        if self._stop.is_set() or self._failed.is_set():
            raise Stopped

    def _check_digest(self, partial: PartialFile, file: SourceFile) -> None:
        found = partial.hashes.published
        if file.digest and found != file.digest:
            partial.discard()
            raise SourceError(
                f"{self._source.text}: {file.name} is {found}, but {file.digest} is published",
                "it was damaged on its way or at its source; its bytes were thrown away",
            )

    def _restart(self, partial: PartialFile) -> None:
        self._report(-partial.num_bytes)
        partial.restart()

    def _partial_path(self, file: SourceFile) -> Path:
        """Another content of the same name has another partial file."""
        identity = "\0".join(
            (self._source.text, file.name, str(file.num_bytes), file.digest, file.version)
        )
        name = hashlib.sha256(identity.encode()).hexdigest()[:32]
        return self._store.root / "partial" / f"{name}.part"

    def _read_small(self, file: SourceFile) -> bytes:
        return b"".join(self._source.read(file))

    def _report(self, num_bytes: int, is_new: bool = False) -> None:
        with self._lock:
            self._num_done += num_bytes
            self._num_moved += num_bytes if is_new else 0
            self._on_progress(self._num_done, self._num_bytes)


def _succeeded(future: Future[RecordedFile]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _worst_first(futures: Sequence[Future[RecordedFile]]) -> Sequence[Future[RecordedFile]]:
    """Failures before the stops that they caused; successes in their order."""

    def badness(future: Future[RecordedFile]) -> int:
        error = future.exception()
        return 2 if error is None else int(isinstance(error, Stopped))

    return sorted(futures, key=badness)
