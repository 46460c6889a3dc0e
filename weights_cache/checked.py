"""Small JSON files that notice damage: the content, and its hash. Damaged is as good as absent."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec
import xxhash

from .files import FileSystem

T = TypeVar("T")


class _Checked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    content: msgspec.Raw
    xxh3_128: str


def encode(content: object) -> bytes:
    raw = msgspec.json.encode(content)
    return msgspec.json.encode(_Checked(msgspec.Raw(raw), xxhash.xxh3_128_hexdigest(raw)))


def decode(data: bytes, kind: type[T]) -> T | None:
    try:
        checked = msgspec.json.decode(data, type=_Checked)
        if xxhash.xxh3_128_hexdigest(bytes(checked.content)) != checked.xxh3_128:
            return None
        return msgspec.json.decode(checked.content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def read(files: FileSystem, path: Path, kind: type[T]) -> T | None:
    """None where there is none, none that can be read, or a damaged one."""
    try:
        return decode(files.read(path), kind)
    except OSError:
        return None
