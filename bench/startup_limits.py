"""What no start can beat on this machine: reading the bytes, copying them, importing the modules.

Knows files, memory and the interpreter; nothing of the server.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import ConfigError
from .startup_cold import drop_pages, resident_fraction

CHUNK_BYTES = 8 << 20
COPY_BYTES = 256 << 20
NUM_TRIES = 3
COMMANDS = {
    "python_s": "pass",
    "import_torch_s": "import torch",
    "import_torch_lean_s": "from pilotlight.engine.lean_torch import import_lean; import_lean()",
    "import_grpc_s": "import grpc",
}


def measure_limits(file: Path) -> dict[str, Any]:
    """Rates in bytes per second, times in seconds (medians). The file's pages end up in memory."""
    limits: dict[str, Any] = {"num_bytes": file.stat().st_size} | _cold_rates(file)
    for num_threads in (1, 2):
        limits[f"warm_read_{num_threads}_bytes_per_s"] = round(read_rate(file, num_threads))
    limits["resident_before_warm_read"] = round(resident_fraction([file]), 4)
    limits["copy_bytes_per_s"] = round(copy_rate())
    limits |= {name: round(run_s(code), 4) for name, code in COMMANDS.items()}
    return limits | {"floor_s": floor_s(limits)}


def _cold_rates(file: Path) -> dict[str, float]:
    """Empty where the pages cannot be dropped, as in a file system that is memory itself."""
    rates: dict[str, float] = {}
    with suppress(ConfigError):
        for num_threads in (1, 2):
            rates["resident_before_read"] = round(drop_pages([file]), 6)
            rates[f"cold_read_{num_threads}_bytes_per_s"] = round(read_rate(file, num_threads))
    return rates


def floor_s(limits: dict[str, Any]) -> float:
    """One process, its torch imported, while a second core brings each byte in from page cache."""
    reading_s: float = limits["num_bytes"] / limits["warm_read_1_bytes_per_s"]
    importing_s: float = limits["import_torch_lean_s"]
    begun_s: float = limits["python_s"]
    return round(max(importing_s, begun_s + reading_s), 4)


def read_rate(file: Path, num_threads: int) -> float:
    """Bytes per second of sequential preads of 8 MiB, each thread over a stretch of its own."""
    num_bytes = file.stat().st_size
    bounds = [num_bytes * i // num_threads for i in range(num_threads + 1)]
    began_s = time.monotonic()
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(_read, [file] * num_threads, bounds[:-1], bounds[1:]))
    return num_bytes / (time.monotonic() - began_s)


def _read(file: Path, offset: int, end: int) -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with file.open("rb", buffering=0) as opened:
        while offset < end:
            part = buffer[: min(CHUNK_BYTES, end - offset)]
            num_read = os.preadv(opened.fileno(), [part], offset)
            if num_read == 0:
                raise EOFError(f"{file} became shorter while it was read: {offset} of {end} bytes")
            offset += num_read


def copy_rate() -> float:
    """Bytes per second of one thread that copies pages which are mapped already."""
    source, target = (np.ones(COPY_BYTES, dtype=np.uint8) for _ in range(2))
    return COPY_BYTES / statistics.median(_copy_s(source, target) for _ in range(NUM_TRIES))


def _copy_s(source: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> float:
    began_s = time.monotonic()
    np.copyto(target, source)
    return time.monotonic() - began_s


def run_s(code: str) -> float:
    """Median seconds of a fresh interpreter that runs `code`, its start and its end included."""
    return statistics.median(_run_s(code) for _ in range(NUM_TRIES))


def _run_s(code: str) -> float:
    began_s = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.monotonic() - began_s
