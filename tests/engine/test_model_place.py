"""Names of models that are not folders."""

from __future__ import annotations

import pytest
from pilotlight.engine.model_place import default_name, is_remote, shown


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/models/qwen/", "qwen"),
        ("hf://Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("hf://Qwen/Qwen2.5-0.5B@v1.0", "Qwen/Qwen2.5-0.5B"),
        ("https://user:pw@models.example/llama/8b/?token=x", "8b"),
        ("https://models.example/", "models.example"),
        ("s3://bucket/llama/8b/", "8b"),
        ("s3://bucket", "bucket"),
    ],
)
def test_a_model_has_a_name_without_being_asked(model: str, name: str) -> None:
    assert default_name(model) == name


def test_only_what_has_a_scheme_is_fetched() -> None:
    assert is_remote("hf://a/b") and not is_remote("/a/b") and not is_remote("a/b")


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("https://user:pw@host/a/", "https://host/a/"),
        ("https://host/a@b/", "https://host/a@b/"),
        ("hf://org/name@main", "hf://org/name@main"),
        ("hf://name@main", "hf://name@main"),
        ("/a/b@c", "/a/b@c"),
    ],
)
def test_a_password_is_not_shown(model: str, text: str) -> None:
    assert shown(model) == text
