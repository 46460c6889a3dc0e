"""transformers as a child that runs what it is told: "SEQUENCES INPUT OUTPUT SEED" a line."""

from __future__ import annotations

import json
import sys
import time


def main(folder: str, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="sdpa")
    model.eval()
    print(json.dumps({"moment": "loaded"}), flush=True)
    for line in sys.stdin:
        num_seqs, num_in, num_out, seed = map(int, line.split())
        torch.manual_seed(seed)
        ids = torch.randint(3, 32000, (num_seqs, num_in))
        began_s = time.perf_counter()
        with torch.no_grad():
            model.generate(
                ids, max_new_tokens=num_out, min_new_tokens=num_out, do_sample=False, pad_token_id=0
            )
        print(json.dumps({"s": time.perf_counter() - began_s}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
