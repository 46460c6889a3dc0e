"""transformers to its first token: from_pretrained in bfloat16 and `generate` of one token."""

from __future__ import annotations

import json
import sys


def main(folder: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    print(json.dumps({"moment": "imported"}), flush=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    print(json.dumps({"moment": "loaded"}), flush=True)
    prompt = torch.zeros((1, 1), dtype=torch.long)
    with torch.no_grad():
        tokens = model.generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)
    print(json.dumps({"moment": "first_token", "token_id": int(tokens[0, -1])}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
