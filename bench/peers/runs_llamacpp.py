"""llama.cpp as a child that runs what it is told: "SEQUENCES INPUT OUTPUT SEED" a line.

Through its C interface, one sequence id for each request; the model is a GGUF file. The tokens that
are fed back are drawn beforehand: sampling is not in its time.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

BATCH, NUM_CELLS = 2048, 32768


class Batch:
    """Collects tokens and computes them, at most BATCH at a time."""

    def __init__(self, api: Any, context: Any) -> None:
        self._api, self._context = api, context
        self._batch = api.llama_batch_init(BATCH, 0, 1)
        self._len = 0

    def add(self, token: int, position: int, sequence: int, wanted: bool) -> None:
        batch, k = self._batch, self._len
        batch.token[k], batch.pos[k], batch.logits[k] = token, position, int(wanted)
        batch.n_seq_id[k], batch.seq_id[k][0] = 1, sequence
        self._len += 1
        if self._len == BATCH:
            self.run()

    def run(self) -> None:
        if self._len:
            self._batch.n_tokens = self._len
            code = self._api.llama_decode(self._context, self._batch)
            if code:
                sys.exit(f"llama_decode: {code}")
            self._len = 0


def context_of(api: Any, path: str) -> Any:
    api.llama_backend_init()
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    wanted = api.llama_context_default_params()
    wanted.n_ctx, wanted.n_batch, wanted.n_ubatch, wanted.n_seq_max = NUM_CELLS, BATCH, 512, 64
    wanted.n_threads = wanted.n_threads_batch = len(os.sched_getaffinity(0))
    # One pool of cells for all sequences: each alone would get a 64th of them.
    wanted.kv_unified = True
    return api.llama_init_from_model(model, wanted)


def main(path: str, _dtype: str) -> None:
    from llama_cpp import llama_cpp as api

    context = context_of(api, path)
    memory, batch = api.llama_get_memory(context), Batch(api, context)
    print(json.dumps({"moment": "loaded"}), flush=True)
    for line in sys.stdin:
        num_seqs, num_in, num_out, seed = map(int, line.split())
        source = random.Random(seed)
        tokens = [[source.randrange(3, 32000) for _ in range(num_in + num_out)]
                  for _ in range(num_seqs)]  # fmt: skip
        api.llama_memory_clear(memory, True)
        began_s = time.perf_counter()
        for sequence, ids in enumerate(tokens):
            for position in range(num_in):
                batch.add(ids[position], position, sequence, position == num_in - 1)
        batch.run()
        for position in range(num_in, num_in + num_out - 1):
            for sequence, ids in enumerate(tokens):
                batch.add(ids[position], position, sequence, True)
            batch.run()
        api.llama_get_logits(context)
        print(json.dumps({"s": time.perf_counter() - began_s}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
