"""Small well-formed checkpoints, made of bytes alone."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
from pathlib import Path

from pilotlight.weights_cache.manifest import INDEX_NAME
from pilotlight.weights_cache.sources.http import SUMS_NAME

SHARDS = ("model-1.safetensors", "model-2.safetensors")
SHARD_BYTES = 1_600_000


def write_checkpoint(
    folder: Path, seed: int = 0, *, has_sums: bool = False, shard_bytes: int = SHARD_BYTES
) -> dict[str, bytes]:
    """A well-formed checkpoint in two shards, and what must not be fetched."""
    contents = {"config.json": b'{"seed": %d}' % seed, "tokenizer.json": b"{}"}
    contents |= {name: shard(name, seed, shard_bytes) for name in SHARDS}
    weight_map = {name.partition(".")[0]: name for name in SHARDS}
    contents[INDEX_NAME] = json.dumps({"weight_map": weight_map}).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, content in (contents | {"evil.py": b"", "pytorch_model.bin": b""}).items():
        (folder / name).write_bytes(content)
    if has_sums:
        lines = (f"{hashlib.sha256(c).hexdigest()}  {name}" for name, c in contents.items())
        (folder / SUMS_NAME).write_text("\n".join(lines))
    return contents


def shard(name: str, seed: int, num_bytes: int = SHARD_BYTES) -> bytes:
    data = random.Random(f"{name}{seed}").randbytes(num_bytes)
    entry = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}
    header = json.dumps({name.partition(".")[0]: entry}).encode()
    return struct.pack("<Q", len(header)) + header + data


def replace_shard(model: Path, seed: int) -> None:
    """Another content of the same length. nginx tells the two apart by seconds and length."""
    new = model / "new"
    new.write_bytes(shard(SHARDS[1], seed))
    os.utime(new, (seed, seed))
    new.rename(model / SHARDS[1])
