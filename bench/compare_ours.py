"""Our engine as a child that runs what it is told: "SEQUENCES INPUT OUTPUT SEED" a line.

The counterpart of bench/peers/runs_*.py. Knows the engine, and no server.
"""

from __future__ import annotations

import argparse
import json
import sys

from ..engine.boot import boot
from ..engine.boot_report import Unheard
from ..engine.config import EngineConfig
from .throughput import run


def main(folder: str, dtype: str) -> None:
    config = EngineConfig(
        model=folder, device="cpu", dtype=dtype, max_num_seqs=64,
        prefix_cache=False, speculative="off", kv_cache_bytes=2 << 30,
    )  # fmt: skip
    booted = boot(config, Unheard(), lambda: None)
    print(json.dumps({"moment": "loaded"}), flush=True)
    for line in sys.stdin:
        num_seqs, num_in, num_out, seed = map(int, line.split())
        case = argparse.Namespace(num_seqs=num_seqs, input_len=num_in, output_len=num_out)
        spent_s = run(booted.core, booted.facts.vocab_size, case, seed)
        print(json.dumps({"s": spent_s}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
