"""Files over HTTP(S): ranges, retries, resuming, and proof that all pieces are of one content.

A dropped connection is continued with Range and If-Range. The validator (a strong ETag, else
Last-Modified) must be the one of the listing, and every length is compared; a file with neither
validator nor published digest starts anew instead. Knows HTTP through httpx2; nothing of stores.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import httpx2 as httpx

from ...engine.errors import SourceError
from ..manifest import INDEX_NAME, SINGLE_NAME
from .retries import Retries, Transient, read_on
from .selection import CONFIG_NAME, MAX_INDEX_BYTES, SIDE_NAMES, shard_names
from .source import Listing, SourceChanged, SourceFile

SUMS_NAME = "SHA256SUMS"
"""The usual name of a file with the others' digests; used where a folder has it."""

MAX_SUMS_BYTES = 1 << 20
TIMEOUT = httpx.Timeout(30.0, connect=10.0)
HEALING = frozenset({408, 425, 429, 500, 502, 503, 504})
MISSING = frozenset({403, 404, 410})
"""403 too: what buckets behind HTTP answer for a file that does not exist."""

_SUM_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class HttpFile:
    """What a server says of a file before its bytes."""

    num_bytes: int
    validator: str


class HttpReader:
    """Requests with retries; one connection pool, shared by threads."""

    def __init__(self, retries: Retries, headers: Mapping[str, str] | None = None) -> None:
        self._retries = retries
        base = {"accept-encoding": "identity", "user-agent": "pilotlight", **(headers or {})}
        self._client = httpx.Client(headers=base, timeout=TIMEOUT, follow_redirects=True)

    def head(self, url: str) -> HttpFile | None:
        """Size and validator; None where the server has no such file."""
        return self._retries.call(shown(url), lambda: self._head(url))

    def _head(self, url: str) -> HttpFile | None:
        try:
            response = self._client.head(url)
        except httpx.TransportError as error:
            raise Transient(_reason(error)) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SourceError(f"{shown(url)}: {_reason(error)}") from error
        if response.status_code in MISSING:
            return None
        _check_status(url, response)
        length = response.headers.get("content-length", "")
        if not length.isdigit():
            raise SourceError(f"{shown(url)}: the server does not say its length")
        return HttpFile(int(length), validator_of(response.headers))

    def read(
        self, url: str, file: SourceFile, start: int = 0, *, is_pinned: bool = False
    ) -> Iterator[bytes]:
        """All bytes from `start` on. `is_pinned`: the url can never mean another content."""

        def open_at(position: int) -> Generator[bytes, None, None]:
            return self._pieces(url, file, position, is_pinned)

        return read_on(shown(url), file, start, open_at, self._retries)

    def small(self, url: str, file: SourceFile, max_bytes: int) -> bytes:
        """A whole file that is kept in memory."""
        if file.num_bytes > max_bytes:
            raise SourceError(f"{shown(url)} has {file.num_bytes} B: more than {max_bytes}")
        return b"".join(self.read(url, file))

    def _pieces(
        self, url: str, file: SourceFile, at: int, is_pinned: bool
    ) -> Generator[bytes, None, None]:
        if at and not (is_pinned or file.version or file.digest):
            raise SourceChanged(f"{shown(url)} broke off, and nothing proves what it is")
        headers = {"range": f"bytes={at}-"} if at else {}
        if at and file.version and not is_pinned:
            headers["if-range"] = file.version
        try:
            with self._client.stream("GET", url, headers=headers) as response:
                _check_status(url, response)
                num_known = _check_content(url, response, file, at, is_pinned)
                yield from _without_first(num_known, response.iter_raw())
        except httpx.TransportError as error:
            raise Transient(_reason(error)) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SourceError(f"{shown(url)}: {_reason(error)}") from error

    def close(self) -> None:
        self._client.close()


def _check_status(url: str, response: httpx.Response) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    if status in HEALING:
        asked = response.headers.get("retry-after", "")
        raise Transient(f"HTTP {status}", float(asked) if asked.isdigit() else 0.0)
    if status in (404, 410, 412, 416):
        raise SourceChanged(f"{shown(url)}: HTTP {status}, it is no longer what was listed")
    hint = "its credentials are missing or not enough" if status in (401, 403, 407) else ""
    raise SourceError(f"{shown(url)}: HTTP {status} {response.reason_phrase}".rstrip(), hint)


def _check_content(
    url: str, response: httpx.Response, file: SourceFile, at: int, is_pinned: bool
) -> int:
    """That these bytes are of the listed file. Returns how many of them are known already."""
    headers = response.headers
    if headers.get("content-encoding", "identity") != "identity":
        raise SourceError(f"{shown(url)}: sent compressed, which was not asked for")
    found = validator_of(headers)
    if not is_pinned and file.version and found and found != file.version:
        raise SourceChanged(f"{shown(url)} changed while it was read")
    if response.status_code == 200:
        _check_total(url, file, headers.get("content-length"))
        return at
    match = _RANGE.fullmatch(headers.get("content-range", ""))
    if match is None or int(match[1]) != at:
        raise SourceError(f"{shown(url)}: asked from byte {at}, got other bytes")
    _check_total(url, file, match[3])
    return 0


def _check_total(url: str, file: SourceFile, total: str | None) -> None:
    if total and total.isdigit() and int(total) != file.num_bytes:
        raise SourceChanged(f"{shown(url)} has {total} B, {file.num_bytes} B when it was listed")


def _without_first(num_known: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """A server without ranges sends all again: what is known passes by."""
    for piece in pieces:
        if num_known >= len(piece):
            num_known -= len(piece)
            continue
        yield piece[num_known:]
        num_known = 0


def validator_of(headers: Mapping[str, str]) -> str:
    """What If-Range may be sent with. A weak ETag does not prove equal bytes."""
    tag = headers.get("etag", "")
    return tag if tag.startswith('"') else headers.get("last-modified", "")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def shown(url: str) -> str:
    """A url for people and records: without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


# ---- a folder --------------------------------------------------------------------------------


class HttpSource:
    """A folder by its url. It cannot be listed: names are asked for, shards come from the index."""

    def __init__(self, url: str, retries: Retries | None = None) -> None:
        parts = urlsplit(url)
        self._base = parts._replace(path=parts.path.rstrip("/") + "/", fragment="")
        self._reader = HttpReader(retries or Retries())

    @property
    def text(self) -> str:
        return shown(urlunsplit(self._base))

    @property
    def short_name(self) -> str:
        return unquote(Path(self._base.path).name) or self._base.hostname or "model"

    def local_folder(self) -> Path | None:
        return None

    def list_files(self) -> Listing:
        config = self._find(CONFIG_NAME)
        if config is None:
            raise SourceError(
                f"{self.text} has no {CONFIG_NAME}",
                "name the url of the folder that holds the checkpoint's files (some servers answer "
                "so, with 403, where credentials are missing)",
            )
        sums = self._sums()
        found = [config, *filter(None, map(self._find, SIDE_NAMES)), *self._weights()]
        return Listing(tuple(_with_digest(file, sums) for file in found))

    def read(self, file: SourceFile, start: int = 0) -> Iterator[bytes]:
        return self._reader.read(self._url(file.name), file, start)

    def close(self) -> None:
        self._reader.close()

    def _weights(self) -> list[SourceFile]:
        index = self._find(INDEX_NAME)
        if index is None:
            return list(filter(None, [self._find(SINGLE_NAME)]))
        content = self._reader.small(self._url(INDEX_NAME), index, MAX_INDEX_BYTES)
        return [index, *filter(None, map(self._find, shard_names(content, self.text)))]

    def _sums(self) -> dict[str, str]:
        file = self._find(SUMS_NAME)
        if file is None:
            return {}
        content = self._reader.small(self._url(SUMS_NAME), file, MAX_SUMS_BYTES)
        lines = content.decode("utf-8", "replace").splitlines()
        return {match[2]: match[1].lower() for match in map(_SUM_LINE.fullmatch, lines) if match}

    def _find(self, name: str) -> SourceFile | None:
        head = self._reader.head(self._url(name))
        return SourceFile(name, head.num_bytes, version=head.validator) if head else None

    def _url(self, name: str) -> str:
        return urlunsplit(self._base._replace(path=self._base.path + quote(name)))


def _with_digest(file: SourceFile, sums: Mapping[str, str]) -> SourceFile:
    digest = f"sha256:{sums[file.name]}" if file.name in sums else ""
    return SourceFile(file.name, file.num_bytes, digest, file.version)
