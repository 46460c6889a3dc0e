"""What MODEL may be, as text: a folder, or a place from which its files are fetched. Plain words.

/models/qwen2-0.5b   hf://org/name[@revision]   https://host/folder/   s3://bucket/prefix/
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit


def is_remote(model: str) -> bool:
    """Whether the files have to be in the cache before they can be read."""
    return "://" in model


def default_name(model: str) -> str:
    """What clients may call the model where nobody chose a name."""
    if not is_remote(model):
        return Path(model).resolve().name
    scheme, _, rest = model.partition("://")
    if scheme.lower() == "hf":
        return rest.partition("@")[0]
    url = urlsplit(model)
    return Path(url.path).name or url.hostname or model


def shown(model: str) -> str:
    """For logs: without user and password."""
    scheme, separator, rest = model.partition("://")
    host, slash, path = rest.partition("/")
    _, at, bare = host.rpartition("@")
    # The hub's @ stands before a revision.
    if not separator or not at or scheme.lower() == "hf":
        return model
    return f"{scheme}://{bare}{slash}{path}"
