"""OpenVINO GenAI as a child that runs what it is told: "SEQUENCES INPUT OUTPUT SEED" a line."""

from __future__ import annotations

import json
import random
import sys
import time


def main(folder: str, dtype: str) -> None:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs = 2, 64
    scheduler.max_num_batched_tokens, scheduler.enable_prefix_caching = 2048, False
    # What the processor cannot do in bfloat16 it refuses; "auto" is what it does by itself.
    wanted = {} if dtype == "auto" else {"INFERENCE_PRECISION_HINT": dtype}
    pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", wanted)
    print(json.dumps({"moment": "loaded"}), flush=True)
    for line in sys.stdin:
        num_seqs, num_in, num_out, seed = map(int, line.split())
        source = random.Random(seed)
        generation = genai.GenerationConfig()
        generation.max_new_tokens = generation.min_new_tokens = num_out
        generation.ignore_eos, generation.do_sample = True, False
        ids = [[[source.randrange(3, 32000) for _ in range(num_in)]] for _ in range(num_seqs)]
        prompts = [ov.Tensor(np.array(i, dtype=np.int64)) for i in ids]
        began_s = time.perf_counter()
        answers = pipeline.generate(prompts, [generation] * num_seqs)
        spent_s = time.perf_counter() - began_s
        assert all(len(a.m_generation_ids[0]) == num_out for a in answers)
        print(json.dumps({"s": spent_s}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
