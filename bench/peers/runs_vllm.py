"""vLLM as a child that runs what it is told: "SEQUENCES INPUT OUTPUT SEED" a line, seconds back."""

from __future__ import annotations

import json
import random
import sys
import time


def main(folder: str, dtype: str) -> None:
    from vllm import LLM, SamplingParams

    model = LLM(
        model=folder, dtype=dtype, max_model_len=8192, max_num_seqs=64, skip_tokenizer_init=True,
        enforce_eager=True, enable_prefix_caching=False,
    )  # fmt: skip
    print(json.dumps({"moment": "loaded"}), flush=True)
    for line in sys.stdin:
        num_seqs, num_in, num_out, seed = map(int, line.split())
        source = random.Random(seed)
        prompts = [
            {"prompt_token_ids": [source.randrange(3, 32000) for _ in range(num_in)]}
            for _ in range(num_seqs)
        ]
        sampling = SamplingParams(
            max_tokens=num_out, ignore_eos=True, temperature=0, detokenize=False
        )
        began_s = time.perf_counter()
        model.generate(prompts, sampling, use_tqdm=False)
        print(json.dumps({"s": time.perf_counter() - began_s}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
