"""OpenVINO GenAI to its first token: continuous batching on a model converted beforehand."""

from __future__ import annotations

import json
import sys


def main(folder: str) -> None:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    print(json.dumps({"moment": "imported"}), flush=True)
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", {})
    print(json.dumps({"moment": "loaded"}), flush=True)
    generation = genai.GenerationConfig()
    generation.max_new_tokens, generation.ignore_eos, generation.do_sample = 1, True, False
    prompt = ov.Tensor(np.zeros((1, 1), dtype=np.int64))
    answer = pipeline.generate([prompt], [generation])[0]
    token_id = int(answer.m_generation_ids[0][0])
    print(json.dumps({"moment": "first_token", "token_id": token_id}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
