"""The name of an artefact: a hash of everything that its bytes depend on.

Whatever differs makes another name, so a foreign or stale artefact is never opened: it is a miss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from .arena import FORMAT


def artefact_key(
    source_digests: Mapping[str, str],
    config_digest: str,
    dtype: str,
    quantisation: str,
    layout_version: int,
    target: str,
    tensor_parallel_rank: int = 0,
    tensor_parallel_size: int = 1,
) -> str:
    """`source_digests`: sha256 of each weight file by name; `target`: what it is laid out for."""
    parts = {
        "format": FORMAT,
        "sources": dict(source_digests),
        "config": config_digest,
        "dtype": dtype,
        "quantisation": quantisation,
        "layout": layout_version,
        "target": target,
        "rank": [tensor_parallel_rank, tensor_parallel_size],
    }
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
