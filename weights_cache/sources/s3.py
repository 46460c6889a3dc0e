"""A folder in S3, or in anything that speaks its API, through boto3.

Region, endpoint, credentials and proxies are boto3's own business (AWS_ENDPOINT_URL_S3 included).
boto3 is an extra: `pip install 'pilotlight[s3]'`. A read carries If-Match, so an object that was
replaced is never mixed with its older self.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ...engine.errors import SourceError
from .http import HEALING
from .retries import Retries, Transient, read_on
from .selection import SIDE_PATTERNS
from .source import Listing, SourceChanged, SourceFile, is_plain_name

T = TypeVar("T")

PIECE_BYTES = 1 << 18
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 30


class S3Source:
    """`s3://bucket/prefix/`."""

    def __init__(self, bucket: str, prefix: str, retries: Retries | None = None) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._retries = retries or Retries()
        self._client = _client()

    @property
    def text(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}"

    @property
    def short_name(self) -> str:
        return Path(self._prefix).name or self._bucket

    def local_folder(self) -> Path | None:
        return None

    def list_files(self) -> Listing:
        files = self._retries.call(self.text, lambda: self._guarded(self.text, self._list))
        return Listing(tuple(self._with_digest(file) for file in files))

    def _list(self) -> list[SourceFile]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix, Delimiter="/"
        )
        items = [item for page in pages for item in page.get("Contents", ())]
        files = [self._listed(item) for item in items]
        return [file for file in files if is_plain_name(file.name)]

    def _listed(self, item: dict[str, Any]) -> SourceFile:
        name = item["Key"].removeprefix(self._prefix)
        return SourceFile(name, item["Size"], version=item["ETag"])

    def _with_digest(self, file: SourceFile) -> SourceFile:
        """The sha256 that S3 keeps of an object, if it was uploaded with one."""
        if not _may_be_wanted(file.name):
            return file
        what = self.text + file.name
        head = self._retries.call(what, lambda: self._guarded(what, lambda: self._head(file)))
        checksum = head.get("ChecksumSHA256", "")
        if not checksum or "-" in checksum or head.get("ChecksumType") == "COMPOSITE":
            return file
        digest = f"sha256:{b64decode(checksum).hex()}"
        return SourceFile(file.name, file.num_bytes, digest, file.version)

    def _head(self, file: SourceFile) -> dict[str, Any]:
        return dict(self._client.head_object(**self._object(file), ChecksumMode="ENABLED"))

    def read(self, file: SourceFile, start: int = 0) -> Iterator[bytes]:
        what = self.text + file.name

        def open_at(position: int) -> Generator[bytes, None, None]:
            return self._pieces(what, file, position)

        return read_on(what, file, start, open_at, self._retries)

    def close(self) -> None:
        self._client.close()

    def _pieces(self, what: str, file: SourceFile, at: int) -> Generator[bytes, None, None]:
        body = self._guarded(what, lambda: self._open(what, file, at))
        try:
            pieces = body.iter_chunks(PIECE_BYTES)
            while piece := self._guarded(what, lambda: next(pieces, b"")):
                yield piece
        finally:
            body.close()

    def _open(self, what: str, file: SourceFile, at: int) -> Any:
        spans = {"Range": f"bytes={at}-"} if at else {}
        answer = self._client.get_object(**self._object(file), **spans)
        span = answer.get("ContentRange", "")
        if at and not span.startswith(f"bytes {at}-"):
            raise SourceError(f"{what}: asked from byte {at}, got {span or 'all'}")
        if answer["ContentLength"] != file.num_bytes - at:
            raise SourceChanged(f"{what} is no longer {file.num_bytes} B long")
        return answer["Body"]

    def _object(self, file: SourceFile) -> dict[str, str]:
        return {
            "Bucket": self._bucket,
            "Key": self._prefix + file.name,
            "IfMatch": file.version,
        }

    def _guarded(self, what: str, call: Callable[[], T]) -> T:
        """Sorts the library's errors: another try may help, the object changed, or neither."""
        from botocore import exceptions as boto

        try:
            return call()
        except boto.ClientError as error:
            raise _sorted(what, error) from error
        except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
            hint = "give them as for the aws command: a profile, a role or AWS_ACCESS_KEY_ID"
            raise SourceError(f"{what}: no credentials", hint) from error
        except (boto.HTTPClientError, boto.IncompleteReadError) as error:
            raise Transient(" ".join(str(error).split())) from error
        except boto.BotoCoreError as error:
            raise SourceError(f"{what}: {error}") from error


def _sorted(what: str, error: Any) -> Exception:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    said = error.response.get("Error", {})
    reason = f"{said.get('Code', status)} {said.get('Message', '')}".strip()
    if status in HEALING:
        return Transient(reason)
    if status in (404, 412, 416) and said.get("Code") != "NoSuchBucket":
        return SourceChanged(f"{what}: {reason}")
    hint = "its credentials are not enough" if status in (401, 403) else ""
    return SourceError(f"{what}: {reason}", hint)


def _may_be_wanted(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json")) or any(
        Path(name).match(pattern) for pattern in SIDE_PATTERNS
    )


def _client() -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise SourceError(
            "s3:// needs boto3, which is not installed", "pip install 'pilotlight[s3]'"
        ) from error
    # Trying again is ours, and so is the digest.
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": 1},
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client("s3", config=config)
