"""Local folders, what an operator may write as a source, and which files of one are wanted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pilotlight.engine.errors import ConfigError, SourceError
from pilotlight.weights_cache.manifest import INDEX_NAME
from pilotlight.weights_cache.sources.hub import HubSource
from pilotlight.weights_cache.sources.local import LocalSource
from pilotlight.weights_cache.sources.parse import parse_source
from pilotlight.weights_cache.sources.selection import wanted_files
from pilotlight.weights_cache.sources.source import (
    Listing,
    SourceChanged,
    SourceFile,
    is_plain_name,
)

# ---- parsing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown", "name"),
    [
        ("hf://org/qwen", "hf://org/qwen", "qwen"),
        ("hf://org/qwen@main", "hf://org/qwen", "qwen"),
        ("hf://org/qwen@refs/pr/1", "hf://org/qwen@refs/pr/1", "qwen"),
        ("https://example.com/m/qwen", "https://example.com/m/qwen/", "qwen"),
        ("HTTPS://me:pw@example.com/m/q%20w/?t=1#x", "https://example.com/m/q%20w/", "q w"),
        ("https://example.com", "https://example.com/", "example.com"),
    ],
)
def test_sources_of_a_network(text: str, shown: str, name: str) -> None:
    source = parse_source(text)
    assert (source.text, source.short_name) == (shown, name)
    source.close()


def test_s3_is_a_bucket_and_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("boto3", reason="boto3 of the s3 extra is missing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for text, shown, name in (
        ("s3://models/a/qwen", "s3://models/a/qwen/", "qwen"),
        ("s3://models", "s3://models/", "models"),
    ):
        source = parse_source(text)
        assert (source.text, source.short_name) == (shown, name)
        source.close()


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = parse_source(".")
    assert isinstance(source, LocalSource)
    assert source.local_folder() == Path()
    assert source.text == str(tmp_path)
    assert source.short_name == tmp_path.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("org/qwen", "no such folder; for the hub write hf://org/qwen"),
        ("/no/such/folder", "no such folder; give a folder, hf://"),
        ("ftp://example.com/x", "ftp:// is not known; give a folder, hf://"),
        ("hf://", "give hf://org/name"),
        ("hf://a/b/c", "give hf://org/name"),
        ("hf://a/b@", "give hf://org/name"),
        ("https://", "not a url"),
        ("https://[::1", "not a url"),
        ("s3://", "give s3://bucket/prefix/"),
    ],
)
def test_other_texts_are_refused_with_what_was_meant(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="SOURCE is") as caught:
        parse_source(text)
    assert message in str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="a file; give the folder"):
        parse_source(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["model.safetensors", "a b.json", "tok=1.json"])
def test_plain_names(name: str) -> None:
    assert is_plain_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "a/b", "a\\b", "a\0", "a\n", "x" * 256])
def test_names_that_are_no_file_of_a_folder(name: str) -> None:
    assert not is_plain_name(name)


# ---- reading a folder ------------------------------------------------------------------------


def test_a_folder_lists_its_files_and_reads_from_anywhere(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "deeper").mkdir()
    source = LocalSource(tmp_path)
    (file,) = source.list_files().files
    assert (file.name, file.num_bytes, file.digest) == ("model.safetensors", len(content), "")
    for start in (0, 1, 2_000_000, len(content)):
        assert b"".join(source.read(file, start)) == content[start:]


@pytest.mark.parametrize("content", [b"shorter", b"of equal len", b"a good deal longer"])
def test_a_file_that_changed_after_the_listing_is_noticed(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"as listed, 1")
    source = LocalSource(tmp_path)
    (file,) = source.list_files().files
    path.write_bytes(content)
    os.utime(path, (1, 1))
    with pytest.raises(SourceChanged):
        b"".join(source.read(file))


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    source = LocalSource(tmp_path)
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        b"".join(source.read(SourceFile("gone", 1)))


def test_a_ref_cannot_lead_out_of_the_cache(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("0123")
    (tmp_path / "models--a--b" / "refs").mkdir(parents=True)
    source = HubSource("a/b", "../../secret", endpoint="http://127.0.0.1:9", cache_folder=tmp_path)
    assert source._cached() is None


# ---- which files -----------------------------------------------------------------------------


def listing(*names: str) -> Listing:
    return Listing(tuple(SourceFile(name, 10) for name in names))


def wanted(*names: str, index: object = None) -> list[str]:
    files = wanted_files(listing(*names), lambda _file: json.dumps(index).encode(), "there")
    return [file.name for file in files]


def test_configuration_tokenizer_and_the_one_file() -> None:
    side = ("chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json")
    others = ("README.md", "modeling.py", "pytorch_model.bin", "x.pt", "consolidated.safetensors")
    assert wanted(*others, "model.safetensors", *side) == [*side, "model.safetensors"]


def test_the_shards_that_the_index_names_and_no_others() -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    shards = ["model-1.safetensors", "model-2.safetensors"]
    others = ("model.safetensors", "consolidated.safetensors")
    found = wanted("config.json", INDEX_NAME, *shards, *others, index=index)
    assert found == ["config.json", INDEX_NAME, *shards]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("model.safetensors",), "holds no config.json"),
        (("config.json",), "holds neither model.safetensors nor"),
        (("config.json", "pytorch_model.bin"), "pytorch_model.bin but no safetensors; the other"),
        (("config.json", INDEX_NAME), "lacks model-1.safetensors, which"),
    ],
)
def test_what_is_missing_is_named(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(SourceError) as caught:
        wanted(*names, index={"weight_map": {"a": "model-1.safetensors"}})
    assert message in str(caught.value)


@pytest.mark.parametrize("index", [None, [], {}, {"weight_map": 3}, {"weight_map": {"a": [1]}}])
def test_an_index_that_is_none_is_refused(index: object) -> None:
    with pytest.raises(SourceError, match="is not a safetensors index"):
        wanted("config.json", INDEX_NAME, index=index)
