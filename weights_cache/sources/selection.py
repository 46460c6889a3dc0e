"""Which files of a checkpoint are wanted: configuration, tokenizer, safetensors; never code.

Other weight formats (.bin, .pt) can run code when they are read, and stay where they are. Knows the
names of files; what is in them only for the index of the shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from fnmatch import fnmatchcase

from ...engine.errors import SourceError
from ..manifest import INDEX_NAME, SINGLE_NAME
from .source import Listing, SourceFile, is_plain_name

CONFIG_NAME = "config.json"
SIDE_NAMES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What to ask for by name where a place cannot be listed."""

SIDE_PATTERNS = (CONFIG_NAME, "generation_config.json", "tokenizer*.json", "chat_template*")
MAX_INDEX_BYTES = 64 << 20

ReadSmall = Callable[[SourceFile], bytes]


def wanted_files(listing: Listing, read_small: ReadSmall, text: str) -> tuple[SourceFile, ...]:
    """The files to fetch, small ones first. `text` names the source in errors (SourceError)."""
    if listing.file(CONFIG_NAME) is None:
        raise SourceError(
            f"{text} holds no {CONFIG_NAME}", "name the folder of a Hugging Face checkpoint"
        )
    side = [file for file in listing.files if _is_side(file.name)]
    names = _weight_names(listing, read_small, text)
    weights = [_listed(listing, name, text) for name in names]
    return (*sorted(side, key=lambda file: file.name), *weights)


def _is_side(name: str) -> bool:
    return is_plain_name(name) and any(fnmatchcase(name, pattern) for pattern in SIDE_PATTERNS)


def _weight_names(listing: Listing, read_small: ReadSmall, text: str) -> list[str]:
    index = listing.file(INDEX_NAME)
    if index is not None:
        if index.num_bytes > MAX_INDEX_BYTES:
            raise SourceError(f"{text}: {INDEX_NAME} has {index.num_bytes} B, of {MAX_INDEX_BYTES}")
        return [INDEX_NAME, *shard_names(read_small(index), text)]
    if listing.file(SINGLE_NAME) is None:
        raise SourceError(_why_no_weights(listing, text), _way_out(listing))
    return [SINGLE_NAME]


def shard_names(index: bytes, text: str) -> list[str]:
    """The files that an index names, in order."""
    try:
        names = set(json.loads(index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{text}: {INDEX_NAME} is not a safetensors index ({error!r})") from error
    for name in names:
        if not isinstance(name, str) or not is_plain_name(name) or not _is_safetensors(name):
            raise SourceError(f"{text}: {INDEX_NAME} names {name!r}, no .safetensors file here")
    return sorted(names)


def _is_safetensors(name: str) -> bool:
    return name.endswith(".safetensors")


def _listed(listing: Listing, name: str, text: str) -> SourceFile:
    file = listing.file(name)
    if file is None:
        raise SourceError(f"{text} lacks {name}, which {INDEX_NAME} names")
    return file


def _why_no_weights(listing: Listing, text: str) -> str:
    others = _other_weights(listing)
    held = f"{others[0]} but no" if others else "neither"
    rest = "safetensors" if others else f"{SINGLE_NAME} nor {INDEX_NAME}"
    return f"{text} holds {held} {rest}"


def _way_out(listing: Listing) -> str:
    if _other_weights(listing):
        return "the other formats can run code; convert it with transformers' save_pretrained"
    return ""


def _other_weights(listing: Listing) -> list[str]:
    ends = (".bin", ".pt", ".pth", ".gguf")
    return sorted(file.name for file in listing.files if file.name.endswith(ends))
