"""The hub through huggingface_hub: its API and files from nginx, its cache folder on disk, both.

nginx answers the two requests that matter: the model's description with digests, and `resolve`,
which sends large files on to another address as the hub does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from pilotlight.engine.errors import SourceError
from pilotlight.tests.weights_cache.servers import (
    CuttingProxy,
    Nginx,
    Waits,
    cutting,
    nginx,
    patient,
)
from pilotlight.weights_cache.sources.hub import HubSource
from pilotlight.weights_cache.sources.local import LocalSource
from pilotlight.weights_cache.sources.source import SourceFile

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = b'{"model_type": "llama"}'
WEIGHTS = bytes(range(256)) * 8_000

LOCATIONS = """
absolute_redirect off;
location /api/models/ { default_type application/json; try_files $uri.json =404; }
location /api/models/org/gated/ {
    add_header X-Error-Code GatedRepo always;
    add_header X-Error-Message "Access to model org/gated is restricted" always;
    return 403;
}
location /api/models/org/private/ { add_header X-Error-Code RepoNotFound always; return 401; }
location /api/models/org/busy/ { return 503; }
rewrite ^/org/tiny/resolve/([0-9a-f]+)/(.*safetensors)$ /cdn/$1/$2 redirect;
"""

Open = Callable[..., HubSource]


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def write_hub(root: Path) -> None:
    """What nginx serves: descriptions in api/, small files in resolve/, large ones in cdn/."""
    lfs = {"size": len(WEIGHTS), "sha256": hashlib.sha256(WEIGHTS).hexdigest(), "pointerSize": 134}
    siblings = [
        {"rfilename": "config.json", "size": len(CONFIG), "blobId": git_sha1(CONFIG)},
        {"rfilename": "model.safetensors", "size": len(WEIGHTS), "blobId": "f" * 40, "lfs": lfs},
        {"rfilename": "onnx/model.onnx", "size": 5, "blobId": "e" * 40},
    ]
    info = {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": siblings}
    for revision in ("main", COMMIT):
        _write(root / f"api/models/org/tiny/revision/{revision}.json", json.dumps(info).encode())
    _write(root / f"org/tiny/resolve/{COMMIT}/config.json", CONFIG)
    _write(root / f"cdn/{COMMIT}/model.safetensors", WEIGHTS)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_cache(cache: Path, weights: bytes | None = WEIGHTS) -> Path:
    """The hub cache as the library lays it out, with its symlinks. Returns the snapshot."""
    repo = cache / "models--org--tiny"
    snapshot = repo / "snapshots" / COMMIT
    _write(repo / "refs/main", COMMIT.encode())
    names = {"config.json": (CONFIG, git_sha1(CONFIG))}
    if weights is not None:
        names["model.safetensors"] = (weights, hashlib.sha256(weights).hexdigest())
    snapshot.mkdir(parents=True)
    for name, (content, etag) in names.items():
        _write(repo / "blobs" / etag, content)
        (snapshot / name).symlink_to(f"../../blobs/{etag}")
    return snapshot


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    root = tmp_path_factory.mktemp("hub")
    write_hub(root)
    with nginx(root, root / "nginx", LOCATIONS) as server:
        yield server


@pytest.fixture
def proxy(hub: Nginx) -> Iterator[CuttingProxy]:
    with cutting(hub.port) as proxy:
        yield proxy


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def opened(waits: Waits, proxy: CuttingProxy, tmp_path: Path) -> Iterator[Open]:
    with ExitStack() as stack:

        def open_source(repo_id: str, revision: str = "main", endpoint: str = "") -> HubSource:
            source = HubSource(
                repo_id,
                revision,
                endpoint=endpoint or proxy.url,
                cache_folder=tmp_path / "hub-cache",
                retries=patient(waits, max_failures=2),
            )
            stack.callback(source.close)
            return source

        yield open_source


@pytest.fixture
def nobody(hub: Nginx) -> str:
    """An endpoint where nobody listens."""
    with cutting(hub.port) as closed:
        pass
    return closed.url


def file_of(source: HubSource, name: str) -> SourceFile:
    file = source.list_files().file(name)
    assert file is not None
    return file


def read_all(source: HubSource, file: SourceFile, start: int = 0) -> bytes:
    return b"".join(source.read(file, start))


# ---- over the network ------------------------------------------------------------------------


def test_the_listing_has_sizes_digests_and_the_commit(opened: Open) -> None:
    source = opened("org/tiny")
    listing = source.list_files()
    assert listing.revision == COMMIT
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert listing.files == (
        SourceFile("config.json", len(CONFIG), f"git-sha1:{git_sha1(CONFIG)}", COMMIT),
        SourceFile("model.safetensors", len(WEIGHTS), f"sha256:{sha256}", COMMIT),
    )
    assert (source.text, source.short_name) == ("hf://org/tiny", "tiny")
    assert opened("org/tiny", COMMIT).text == f"hf://org/tiny@{COMMIT}"
    assert source.local_folder() is None


def test_large_files_come_from_where_the_hub_sends_one(opened: Open, hub: Nginx) -> None:
    source = opened("org/tiny")
    assert read_all(source, file_of(source, "model.safetensors")) == WEIGHTS
    assert read_all(source, file_of(source, "config.json"), 5) == CONFIG[5:]
    assert any("/cdn/" in request for request in hub.requests())


def test_a_cut_line_is_read_on_without_a_validator(
    opened: Open, proxy: CuttingProxy, waits: Waits
) -> None:
    source = opened("org/tiny")
    file = file_of(source, "model.safetensors")
    proxy.cut_after(300_000, 900_000)
    assert read_all(source, file) == WEIGHTS
    assert len(waits.delays_s) == 2
    assert proxy.num_bytes < len(WEIGHTS) + 10_000, "bytes were moved twice"


@pytest.mark.parametrize(
    ("repo_id", "revision", "message"),
    [
        ("org/none", "main", "404"),
        ("org/tiny", "no-such-branch", "404"),
        ("org/gated", "main", "accept its terms"),
        ("org/private", "main", "check the name; a private one needs a token"),
        ("org/busy", "main", "HTTP 503, 3 times in a row"),
        ("org/-bad-", "main", "org/-bad-"),
    ],
)
def test_refusals_are_one_readable_line(
    opened: Open, repo_id: str, revision: str, message: str
) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        opened(repo_id, revision).list_files()
    assert "\n" not in str(caught.value)


# ---- the cache on disk -----------------------------------------------------------------------


def test_a_cached_snapshot_is_read_in_place(opened: Open, tmp_path: Path) -> None:
    snapshot = write_cache(tmp_path / "hub-cache")
    assert opened("org/tiny").local_folder() == snapshot


def test_without_a_network_the_cache_serves_at_once(
    opened: Open, nobody: str, tmp_path: Path, waits: Waits
) -> None:
    snapshot = write_cache(tmp_path / "hub-cache")
    source = opened("org/tiny", endpoint=nobody)
    assert source.local_folder() == snapshot
    listing = source.list_files()
    assert listing.revision == COMMIT
    assert [file.digest.partition(":")[0] for file in listing.files] == ["git-sha1", "sha256"]
    assert read_all(source, listing.files[1], 10) == WEIGHTS[10:]
    assert waits.delays_s == []


def test_without_network_and_without_weights_there_is_nothing(
    opened: Open, nobody: str, tmp_path: Path
) -> None:
    write_cache(tmp_path / "hub-cache", weights=None)
    source = opened("org/tiny", endpoint=nobody)
    assert source.local_folder() is None
    with pytest.raises(SourceError, match="the hub cannot be reached"):
        source.list_files()


def test_what_the_cache_has_is_not_downloaded(opened: Open, hub: Nginx, tmp_path: Path) -> None:
    write_cache(tmp_path / "hub-cache", weights=None)
    source = opened("org/tiny")
    num_before = len(hub.requests())
    assert read_all(source, file_of(source, "config.json")) == CONFIG
    assert not any("config.json" in request for request in hub.requests()[num_before:])
    assert read_all(source, file_of(source, "model.safetensors")) == WEIGHTS


def test_a_folder_in_the_caches_layout_is_a_local_source(tmp_path: Path) -> None:
    snapshot = write_cache(tmp_path)
    source = LocalSource(tmp_path / "models--org--tiny")
    assert source.local_folder() == snapshot
    assert source.short_name == LocalSource(snapshot).short_name == "tiny"
    names = {file.name: file.sha256 for file in source.list_files().files}
    assert names == {"config.json": "", "model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()}
    assert b"".join(source.read(source.list_files().files[1], 7)) == WEIGHTS[7:]
