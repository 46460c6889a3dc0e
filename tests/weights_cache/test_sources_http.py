"""Files over HTTP from a real nginx: listing, ranges, cut lines, files that change, refusals."""

from __future__ import annotations

import hashlib
import json
import os
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
from pilotlight.weights_cache.manifest import INDEX_NAME
from pilotlight.weights_cache.sources.http import HttpSource
from pilotlight.weights_cache.sources.source import SourceChanged, SourceFile

WEIGHTS = bytes(range(256)) * 12_000
"""3 MB; any lost or doubled piece shows."""

LOCATIONS = """
location /no-ranges/ { alias {root}/model/; max_ranges 0; }
location /no-validator/ { alias {root}/model/; etag off; add_header Last-Modified ""; }
location /busy/ { add_header Retry-After 7 always; return 503; }
location /moved/ { rewrite ^/moved/(.*)$ /model/$1 redirect; }
location /private/ {
    alias {root}/model/; auth_basic "models"; auth_basic_user_file {root}/users;
}
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Nginx]]:
    root = tmp_path_factory.mktemp("http")
    (root / "users").write_text("ada:{PLAIN}lovelace\n")
    (root / "model").mkdir()
    locations = LOCATIONS.replace("{root}", str(root))
    with nginx(root, root / "nginx", locations) as server:
        yield root, server


@pytest.fixture
def server(served: tuple[Path, Nginx]) -> Nginx:
    return served[1]


@pytest.fixture
def model(served: tuple[Path, Nginx]) -> Path:
    """A folder that looks like a checkpoint from outside, fresh for each test."""
    folder = served[0] / "model"
    for path in folder.iterdir():
        path.unlink()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "pytorch_model.bin").write_bytes(b"code")
    return folder


@pytest.fixture
def proxy(server: Nginx) -> Iterator[CuttingProxy]:
    with cutting(server.port) as proxy:
        yield proxy


@pytest.fixture
def waits() -> Waits:
    return Waits()


Open = Callable[..., HttpSource]


@pytest.fixture
def opened(waits: Waits) -> Iterator[Open]:
    """Makes sources that wait with `waits`, and closes them."""
    with ExitStack() as stack:

        def open_source(url: str, max_failures: int = 5) -> HttpSource:
            source = HttpSource(url, patient(waits, max_failures))
            stack.callback(source.close)
            return source

        yield open_source


def weights_of(source: HttpSource) -> SourceFile:
    file = source.list_files().file("model.safetensors")
    assert file is not None
    return file


def read_all(source: HttpSource, file: SourceFile, start: int = 0) -> bytes:
    return b"".join(source.read(file, start))


# ---- what is there ---------------------------------------------------------------------------


def test_a_folder_is_found_by_the_names_a_checkpoint_has(
    server: Nginx, model: Path, opened: Open
) -> None:
    source = opened(f"{server.url}/model")
    listing = source.list_files()
    sizes = {file.name: file.num_bytes for file in listing.files}
    assert sizes == {"config.json": 2, "tokenizer.json": 8, "model.safetensors": len(WEIGHTS)}
    assert all(file.version.startswith('"') for file in listing.files)
    assert source.text == f"{server.url}/model/"
    assert source.short_name == "model"


def test_shards_come_from_the_index(server: Nginx, model: Path, opened: Open) -> None:
    (model / "model.safetensors").unlink()
    shards = ["model-1.safetensors", "model-2.safetensors"]
    weight_map = {f"t{i}": name for i, name in enumerate(shards)}
    (model / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    for name in shards:
        (model / name).write_bytes(name.encode())
    source = opened(f"{server.url}/model/")
    names = [file.name for file in source.list_files().files]
    assert names[-3:] == [INDEX_NAME, *shards]


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a.bin", ".x.safetensors"])
def test_an_index_may_name_only_safetensors_of_its_folder(
    server: Nginx, model: Path, name: str, opened: Open
) -> None:
    (model / INDEX_NAME).write_text(json.dumps({"weight_map": {"t": name}}))
    with pytest.raises(SourceError, match=r"index\.json names"):
        opened(f"{server.url}/model/").list_files()


def test_sha256sums_are_the_published_digests(server: Nginx, model: Path, opened: Open) -> None:
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    (model / "SHA256SUMS").write_text(f"# sums\n{sha256}  model.safetensors\n")
    assert weights_of(opened(f"{server.url}/model/")).sha256 == sha256


def test_a_folder_without_a_configuration_is_refused(
    server: Nginx, model: Path, opened: Open
) -> None:
    with pytest.raises(SourceError, match=r"has no config\.json; name the url of the folder"):
        opened(f"{server.url}/nothing/").list_files()


def test_redirects_are_followed(server: Nginx, model: Path, opened: Open) -> None:
    source = opened(f"{server.url}/moved/")
    assert read_all(source, weights_of(source)) == WEIGHTS


def test_credentials_open_and_stay_hidden(server: Nginx, model: Path, opened: Open) -> None:
    private = opened(f"http://ada:lovelace@127.0.0.1:{server.port}/private/?key=secret")
    assert read_all(private, weights_of(private)) == WEIGHTS
    assert private.text == f"{server.url}/private/"
    with pytest.raises(SourceError, match=r"HTTP 401.*credentials") as caught:
        opened(f"http://ada:wrong@127.0.0.1:{server.port}/private/").list_files()
    assert "wrong" not in str(caught.value)


# ---- bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 70_000, len(WEIGHTS) - 1, len(WEIGHTS)])
def test_reading_starts_anywhere(server: Nginx, model: Path, start: int, opened: Open) -> None:
    source = opened(f"{server.url}/model/")
    assert read_all(source, weights_of(source), start) == WEIGHTS[start:]


def test_a_cut_line_is_read_on_from_where_it_broke(
    proxy: CuttingProxy, model: Path, waits: Waits, opened: Open
) -> None:
    source = opened(f"{proxy.url}/model/")
    file = weights_of(source)
    proxy.cut_after(500_000, 3, 900_000, 200_000)
    assert read_all(source, file) == WEIGHTS
    assert proxy.num_cuts == 4
    assert len(waits.delays_s) == 4
    assert proxy.num_bytes < len(WEIGHTS) + 10_000, "bytes were moved twice"


def test_delays_double_and_are_bounded_and_then_it_gives_up(
    proxy: CuttingProxy, model: Path, waits: Waits, opened: Open
) -> None:
    source = opened(f"{proxy.url}/model/", max_failures=8)
    file = weights_of(source)
    proxy.cut_after(*[0] * 9)
    with pytest.raises(SourceError, match="9 times in a row; the same command later goes on"):
        read_all(source, file)
    assert waits.delays_s == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_a_byte_that_arrives_renews_the_patience(
    proxy: CuttingProxy, model: Path, waits: Waits, opened: Open
) -> None:
    source = opened(f"{proxy.url}/model/", max_failures=1)
    file = weights_of(source)
    proxy.cut_after(*[100_000] * 20)
    assert read_all(source, file) == WEIGHTS
    assert set(waits.delays_s) == {0.5}


def test_a_file_that_changes_meanwhile_is_not_mixed(
    proxy: CuttingProxy, model: Path, waits: Waits, opened: Open
) -> None:
    source = opened(f"{proxy.url}/model/")
    file = weights_of(source)
    path = model / "model.safetensors"
    waits.on_wait = lambda: _replace(path, WEIGHTS[::-1])
    proxy.cut_after(500_000)
    with pytest.raises(SourceChanged, match="changed while it was read"):
        read_all(source, file)


def _replace(path: Path, content: bytes) -> None:
    """Another file under the same name, with another time."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    os.utime(new, (1_000_000, 1_000_000))
    new.rename(path)


@pytest.mark.parametrize("content", [WEIGHTS[:-1], WEIGHTS + b"x", b""])
def test_another_length_than_listed_is_a_change(
    server: Nginx, model: Path, content: bytes, opened: Open
) -> None:
    source = opened(f"{server.url}/model/")
    file = weights_of(source)
    _replace(model / "model.safetensors", content)
    with pytest.raises(SourceChanged):
        read_all(source, file)


def test_a_file_that_vanishes_is_a_change(server: Nginx, model: Path, opened: Open) -> None:
    source = opened(f"{server.url}/model/")
    file = weights_of(source)
    (model / "model.safetensors").unlink()
    with pytest.raises(SourceChanged, match="HTTP 404"):
        read_all(source, file)


def test_a_server_without_ranges_sends_again_what_passes_by(
    proxy: CuttingProxy, model: Path, waits: Waits, opened: Open
) -> None:
    source = opened(f"{proxy.url}/no-ranges/")
    file = weights_of(source)
    proxy.cut_after(1_000_000)
    assert read_all(source, file) == WEIGHTS
    assert proxy.num_cuts == 1
    assert proxy.num_bytes > len(WEIGHTS) + 900_000


def test_without_a_validator_nothing_is_read_on(
    proxy: CuttingProxy, model: Path, waits: Waits, opened: Open
) -> None:
    source = opened(f"{proxy.url}/no-validator/")
    file = weights_of(source)
    assert file.version == ""
    proxy.cut_after(1_000_000)
    with pytest.raises(SourceChanged, match="nothing proves what it is"):
        read_all(source, file)


def test_a_published_digest_will_prove_it(
    proxy: CuttingProxy, model: Path, waits: Waits, opened: Open
) -> None:
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    (model / "SHA256SUMS").write_text(f"{sha256}  model.safetensors\n")
    source = opened(f"{proxy.url}/no-validator/")
    file = weights_of(source)
    proxy.cut_after(1_000_000)
    assert read_all(source, file) == WEIGHTS


def test_a_busy_server_is_asked_again_when_it_said(
    server: Nginx, model: Path, waits: Waits, opened: Open
) -> None:
    with pytest.raises(SourceError, match="HTTP 503, 3 times in a row"):
        opened(f"{server.url}/busy/", max_failures=2).list_files()


def test_retry_after_is_kept(server: Nginx, model: Path, waits: Waits, opened: Open) -> None:
    source = opened(f"{server.url}/busy/", max_failures=2)
    with pytest.raises(SourceError, match="HTTP 503"):
        read_all(source, SourceFile("model.safetensors", 10))
    assert waits.delays_s == [7, 7]


def test_nobody_listening_is_one_readable_line(
    model: Path, waits: Waits, server: Nginx, opened: Open
) -> None:
    with cutting(server.port) as closed:
        pass
    with pytest.raises(SourceError, match="times in a row") as caught:
        opened(f"{closed.url}/model/", max_failures=1).list_files()
    assert "\n" not in str(caught.value)
