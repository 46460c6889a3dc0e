"""An operator's text to a source: a folder, hf://, http(s):// or s3://.

Knows the forms; each source's own module is imported when it is named.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from ...engine.errors import ConfigError
from .local import LocalSource
from .retries import Retries
from .source import Source

FORMS = "a folder, hf://org/name[@revision], https://host/folder/ or s3://bucket/prefix/"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_REPO = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


def parse_source(text: str, retries: Retries | None = None) -> Source:
    """The source that `text` names. Raises ConfigError, with the form that was meant."""
    scheme = _SCHEME.match(text)
    if scheme is None:
        return _folder(text)
    rest = text[scheme.end() :]
    match scheme[1].lower():
        case "hf":
            return _hub(text, rest, retries)
        case "http" | "https":
            return _http(text, retries)
        case "s3":
            return _s3(text, rest, retries)
        case other:
            raise ConfigError(f"SOURCE is {text!r}: {other}:// is not known; give {FORMS}")


def _folder(text: str) -> Source:
    folder = Path(text).expanduser()
    if folder.is_dir():
        return LocalSource(folder)
    if folder.exists():
        raise ConfigError(f"SOURCE is {text!r}: a file; give the folder that holds the checkpoint")
    is_repo_like = text.count("/") == 1 and _REPO.fullmatch(text)
    hint = f"for the hub write hf://{text}" if is_repo_like else f"give {FORMS}"
    raise ConfigError(f"SOURCE is {text!r}: no such folder; {hint}")


def _hub(text: str, rest: str, retries: Retries | None) -> Source:
    repo_id, _, revision = rest.partition("@")
    if not _REPO.fullmatch(repo_id) or ("@" in rest and not revision):
        raise ConfigError(f"SOURCE is {text!r}: give hf://org/name or hf://org/name@revision")
    from .hub import HubSource

    return HubSource(repo_id, revision or "main", retries=retries)


def _http(text: str, retries: Retries | None) -> Source:
    try:
        has_host = bool(urlsplit(text).hostname)
    except ValueError:
        has_host = False
    if not has_host:
        raise ConfigError(f"SOURCE is {text!r}: not a url; give https://host/folder/")
    from .http import HttpSource

    return HttpSource(text, retries)


def _s3(text: str, rest: str, retries: Retries | None) -> Source:
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(f"SOURCE is {text!r}: give s3://bucket/prefix/")
    from .s3 import S3Source

    return S3Source(bucket, prefix, retries)
