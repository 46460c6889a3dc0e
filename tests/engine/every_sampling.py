"""Run as a program: the demo model's answers to every kind of sampling, a line per output.

Words: lean or whole (torch), native or reference (kernels), dtype, dtype of the KV cache.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pilotlight.demo
from pilotlight.engine import lean_torch

DEMO = Path(pilotlight.demo.__file__).parent / "model"


def main(torch: str, kernels: str, dtype: str, kv_cache_dtype: str) -> None:
    if torch == "lean":
        lean_torch.import_lean()
    if kernels == "reference":
        _hide_native_kernels()
    from msgspec.structs import replace
    from pilotlight.engine.boot import boot
    from pilotlight.engine.boot_report import Unheard
    from pilotlight.engine.config import EngineConfig

    config = EngineConfig(
        model=str(DEMO), device="cpu", dtype=dtype, kv_cache_dtype=kv_cache_dtype,
        kv_cache_bytes=8 << 20, max_num_seqs=8, max_batched_tokens=32, max_model_len=200,
        max_decode_slowdown=0.0,
        num_threads=1, speculative="ngram",
    )  # fmt: skip
    booted = boot(config, Unheard(), lambda: None)
    core = booted.core
    print(booted.facts.kernels)
    for submit in _requests():
        core.submit(submit)
    while core.has_work:
        record = core.step()
        for output in record.outputs if record else []:
            print(replace(output, first_scheduled_s=0.0))


def _hide_native_kernels() -> None:
    from pilotlight.kernels.cpu import native

    native.library = lambda: None  # type: ignore[assignment]


def _requests() -> list[Any]:
    from pilotlight.engine.messages import Submit
    from pilotlight.engine.sampling_params import SamplingParams

    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "num_logprobs": 3},
        {"seed": 1},
        {"seed": 2, "top_k": 5, "n": 2},
        {"seed": 3, "top_p": 0.9, "num_logprobs": 0},
        {"seed": 4, "min_p": 0.1, "temperature": 1.4},
        {"seed": 5, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"seed": 6, "logit_bias": {7: 4.0}, "min_tokens": 4, "stop_token_ids": (7,)},
    ]
    return [
        Submit(
            f"request-{i}",
            [3 + (i + j) % 40 for j in range(1 + 11 * i)],
            SamplingParams(max_tokens=9, ignore_eos=True, **kind),
        )
        for i, kind in enumerate(kinds)
    ]


main(*sys.argv[1:])
