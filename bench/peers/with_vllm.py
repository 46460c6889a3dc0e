"""vLLM to its first token: no compilation, no tokenizer, token ids in, one token out."""

from __future__ import annotations

import json
import sys


def main(folder: str) -> None:
    from vllm import LLM, SamplingParams

    print(json.dumps({"moment": "imported"}), flush=True)
    model = LLM(
        model=folder, dtype="bfloat16", max_model_len=2048, skip_tokenizer_init=True,
        enforce_eager=True,
    )  # fmt: skip
    print(json.dumps({"moment": "loaded"}), flush=True)
    sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    answers = model.generate([{"prompt_token_ids": [0]}], sampling, use_tqdm=False)
    token_id = answers[0].outputs[0].token_ids[0]
    print(json.dumps({"moment": "first_token", "token_id": token_id}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
