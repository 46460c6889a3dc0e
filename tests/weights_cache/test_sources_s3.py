"""S3 by its real API, moto's server: listing, ranges, cut lines, replaced objects, refusals."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from pilotlight.engine.errors import SourceError
from pilotlight.tests.weights_cache.servers import (
    CuttingProxy,
    Waits,
    cutting,
    patient,
    s3_server,
)
from pilotlight.weights_cache.sources.source import SourceChanged, SourceFile

boto3 = pytest.importorskip("boto3", reason="boto3 of the s3 extra is missing")

from pilotlight.weights_cache.sources.s3 import S3Source  # noqa: E402

PART = bytes(range(256)) * (5 << 12)
"""5 MiB, the least that S3 takes as a part."""

WEIGHTS = PART + b"the last part"

Open = Callable[..., S3Source]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def proxy(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[CuttingProxy]:
    """Between boto3 and S3: the environment points boto3 at it, as an operator would."""
    with cutting(port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield proxy


@pytest.fixture
def s3(proxy: CuttingProxy) -> Iterator[Any]:
    """An empty bucket `models` with a checkpoint in `qwen/`, uploaded in parts."""
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    for name in ("config.json", "nested/other.json", "notes.txt"):
        client.put_object(Bucket="models", Key=f"qwen/{name}", Body=b"{}")
    upload(client, [PART, b"the last part"])
    yield client
    for item in client.list_objects_v2(Bucket="models").get("Contents", ()):
        client.delete_object(Bucket="models", Key=item["Key"])
    client.delete_bucket(Bucket="models")
    client.close()


def upload(client: Any, parts: list[bytes]) -> None:
    where = {"Bucket": "models", "Key": "qwen/model.safetensors"}
    upload_id = client.create_multipart_upload(**where)["UploadId"]
    tags = []
    for number, part in enumerate(parts, 1):
        answer = client.upload_part(**where, UploadId=upload_id, PartNumber=number, Body=part)
        tags.append({"PartNumber": number, "ETag": answer["ETag"]})
    client.complete_multipart_upload(**where, UploadId=upload_id, MultipartUpload={"Parts": tags})


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def opened(waits: Waits) -> Iterator[Open]:
    with ExitStack() as stack:

        def open_source(bucket: str, prefix: str = "qwen", max_failures: int = 5) -> S3Source:
            source = S3Source(bucket, prefix, patient(waits, max_failures))
            stack.callback(source.close)
            return source

        yield open_source


def weights_of(source: S3Source) -> SourceFile:
    file = source.list_files().file("model.safetensors")
    assert file is not None
    return file


def read_all(source: S3Source, file: SourceFile, start: int = 0) -> bytes:
    return b"".join(source.read(file, start))


# ---- what is there ---------------------------------------------------------------------------


def test_a_prefix_is_listed_without_what_lies_deeper(s3: Any, opened: Open) -> None:
    source = opened("models", "/qwen")
    listing = source.list_files()
    sizes = {file.name: file.num_bytes for file in listing.files}
    assert sizes == {"config.json": 2, "model.safetensors": len(WEIGHTS), "notes.txt": 2}
    assert source.text == "s3://models/qwen/"
    assert source.short_name == "qwen"


def test_more_objects_than_one_page_lists(
    s3: Any, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    for number in range(7):
        s3.put_object(Bucket="models", Key=f"many/{number}.txt", Body=b"")
    assert len(s3.list_objects_v2(Bucket="models", Prefix="many/")["Contents"]) == 2
    assert len(opened("models", "many").list_files().files) == 7
    monkeypatch.delenv("MOTO_S3_DEFAULT_MAX_KEYS")


def test_a_sha256_that_s3_keeps_is_the_published_digest(s3: Any, opened: Open) -> None:
    content = b"some bytes"
    where = {"Bucket": "models", "Key": "qwen/model.safetensors"}
    s3.put_object(**where, Body=content, ChecksumAlgorithm="SHA256")
    assert weights_of(opened("models")).sha256 == hashlib.sha256(content).hexdigest()


def test_an_empty_prefix_lists_nothing(s3: Any, opened: Open) -> None:
    assert opened("models", "nothing").list_files().files == ()


# ---- bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 1 << 20, len(WEIGHTS) - 1, len(WEIGHTS)])
def test_reading_starts_anywhere(s3: Any, opened: Open, start: int) -> None:
    source = opened("models")
    assert read_all(source, weights_of(source), start) == WEIGHTS[start:]


def test_a_cut_line_is_read_on_from_where_it_broke(
    s3: Any, proxy: CuttingProxy, opened: Open, waits: Waits
) -> None:
    source = opened("models")
    file = weights_of(source)
    proxy.cut_after(1_000_000, 0, 2_000_000)
    assert read_all(source, file) == WEIGHTS
    assert proxy.num_cuts == len(waits.delays_s) == 3
    assert proxy.num_bytes < len(WEIGHTS) + 3 * (300_000), "bytes were moved twice"


def test_an_object_that_is_replaced_meanwhile_is_not_mixed(
    s3: Any, proxy: CuttingProxy, opened: Open, waits: Waits
) -> None:
    source = opened("models")
    file = weights_of(source)
    waits.on_wait = lambda: upload(s3, [PART[::-1], b"the last part"])
    proxy.cut_after(3_000_000)
    with pytest.raises(SourceChanged, match="PreconditionFailed"):
        read_all(source, file)


def test_an_object_that_vanishes_is_a_change(s3: Any, opened: Open) -> None:
    source = opened("models")
    file = weights_of(source)
    s3.delete_object(Bucket="models", Key="qwen/model.safetensors")
    with pytest.raises(SourceChanged, match="NoSuchKey"):
        read_all(source, file)


def test_it_gives_up_with_one_readable_line(
    s3: Any, proxy: CuttingProxy, opened: Open, waits: Waits
) -> None:
    source = opened("models", max_failures=2)
    file = weights_of(source)
    proxy.cut_after(0, 0, 0)
    with pytest.raises(SourceError, match="3 times in a row") as caught:
        read_all(source, file)
    assert "\n" not in str(caught.value)
    assert waits.delays_s == [0.5, 1.0]


# ---- refusals --------------------------------------------------------------------------------


def test_a_bucket_that_is_not_there_is_named(s3: Any, opened: Open) -> None:
    with pytest.raises(SourceError, match="s3://no-such-bucket/qwen/: NoSuchBucket"):
        opened("no-such-bucket").list_files()


def test_without_credentials_it_says_how_to_give_them(
    s3: Any, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(SourceError, match="no credentials; give them as for the aws command"):
        opened("models").list_files()


def test_without_boto3_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(SourceError, match=r"needs boto3.*pip install 'pilotlight\[s3\]'"):
        S3Source("models", "qwen")
