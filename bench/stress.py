"""Mixed requests with aborts on a small model, and the same request alone and in company.

    python -m pilotlight.bench.stress --device cuda --num-requests 1000
    compute-sanitizer --tool memcheck --error-exitcode 9 python -m pilotlight.bench.stress …

Ends with 1 where a request ends other than once, where blocks are lost, or where `--deterministic`
gives a request other tokens among others than alone. Knows the engine's core; no process, no wire.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..engine.boot import boot
from ..engine.boot_report import Unheard
from ..engine.config import EngineConfig
from ..engine.core import EngineCore
from ..engine.messages import FinishReason, Output, Submit
from ..engine.models.config import read_model_config
from ..engine.sampling_params import SamplingParams
from ..engine.worker.kv_cache import block_bytes
from .make_model import SHAPES, write_model

CONTEXT_LEN, VOCABULARY = 200, 400
MOST_AT_ONCE = 48
ABORTED = 0.2
"""Of all requests, each at a moment of its own."""
CHECKED_STEPS = 50
BLOCK_SIZE, NUM_BLOCKS = 16, 40
"""Of a cache that about three of the longest sequences fill."""
MOST_OUTPUT = 80

KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "num_logprobs": 3},
    {"top_k": 5, "n": 2},
    {"top_p": 0.9, "num_logprobs": 0},
    {"min_p": 0.1, "temperature": 1.4},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"logit_bias": {7: 4.0}, "min_tokens": 4, "stop_token_ids": (7,)},
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        write_model(arguments.shape, model, dtype=arguments.dtype)
        settings = {"device": arguments.device, "dtype": arguments.dtype}
        found = {"device": arguments.device, "shape": arguments.shape, "seed": arguments.seed}
        found |= mixed(model, arguments.num_requests, arguments.seed, **settings)
        found["different_in_company"] = different_in_company(model, **settings)
    print(json.dumps(found))
    return int(bool(found["wrong"] or found["different_in_company"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pilotlight.bench.stress",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tiny = sorted(name for name in SHAPES if name.startswith("tiny-"))
    add = parser.add_argument
    add("--device", default="cpu", help="(default: %(default)s)")
    add("--dtype", default="bfloat16", help="(default: %(default)s)")
    add("--shape", default="tiny-llama-gqa", choices=tiny, help="(default: %(default)s)")
    add("--num-requests", type=int, default=1000, metavar="N", help="(default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of all that is random")
    return parser


def mixed(model: Path, num_requests: int, seed: int, **settings: Any) -> dict[str, Any]:
    """Of every kind, of all lengths, some aborted; memory is too small for all at once."""
    dtype = getattr(torch, settings["dtype"])
    few_bytes = NUM_BLOCKS * block_bytes(read_model_config(model), BLOCK_SIZE, dtype)
    run = _Mixed(_core(model, max_num_seqs=32, kv_cache_bytes=few_bytes, **settings), seed)
    began_s = time.perf_counter()
    run.until_over(num_requests)
    return {
        "num_requests": num_requests,
        "num_aborted": len(run.aborted),
        "num_tokens": run.num_tokens,
        "num_steps": run.num_steps,
        "seconds": round(time.perf_counter() - began_s, 3),
        "num_preemptions": run.core.statistics().num_preemptions,
        "wrong": run.wrong + list(run.unended(num_requests)),
    }


class _Mixed:
    """One core under mixed load, and what it did that it must not."""

    def __init__(self, core: EngineCore, seed: int) -> None:
        self.core = core
        self.num_tokens = self.num_steps = 0
        self.aborted: set[str] = set()
        self.wrong: list[str] = []
        self._chance = random.Random(seed)
        self._ended: set[tuple[str, int]] = set()
        self._steps_to_abort: dict[str, int] = {}

    def until_over(self, num_requests: int) -> None:
        waiting = list(_requests(num_requests, self._chance))
        while waiting or self.core.has_work:
            while waiting and self.core.num_in_flight < MOST_AT_ONCE:
                self._submit(waiting.pop())
            self._abort_some()
            record = self.core.step()
            self.num_steps += 1
            for output in record.outputs if record else ():
                self._note(output)
            if self.num_steps % CHECKED_STEPS == 0:
                self.core.check_integrity()
        self.core.check_integrity()
        if self.core.statistics().num_used_blocks:
            self.wrong.append(f"{self.core.statistics().num_used_blocks} blocks are nobody's")

    def unended(self, num_requests: int) -> Iterator[str]:
        for name in (f"r{i}" for i in range(num_requests)):
            if (name, 0) not in self._ended and name not in self.aborted:
                yield f"{name} never ended"

    def _submit(self, submit: Submit) -> None:
        self.core.submit(submit)
        if self._chance.random() < ABORTED:
            self._steps_to_abort[submit.request_id] = self._chance.randint(0, 60)

    def _abort_some(self) -> None:
        due = [name for name, steps in self._steps_to_abort.items() if steps == 0]
        for name in due:
            del self._steps_to_abort[name]
        for name in self._steps_to_abort:
            self._steps_to_abort[name] -= 1
        live = set(self.core.live_request_ids()) if due else set()
        self.aborted |= live & set(due)
        self.core.abort([name for name in due if name in live])

    def _note(self, output: Output) -> None:
        sample = output.request_id, output.index
        self.num_tokens += len(output.token_ids)
        if sample in self._ended:
            self.wrong.append(f"{sample} went on after its end")
        if output.token_ids and output.request_id in self.aborted:
            self.wrong.append(f"{sample} went on after it was aborted")
        if output.finish_reason is FinishReason.ERROR:
            self.wrong.append(f"{sample} ended by an error: {output.error}")
        if output.finish_reason is not FinishReason.NONE:
            self._ended.add(sample)


def _requests(num_requests: int, chance: random.Random) -> Iterator[Submit]:
    for i in range(num_requests):
        num_output = chance.randint(1, MOST_OUTPUT)
        length = chance.randint(1, chance.choice((20, CONTEXT_LEN - num_output - 1)))
        prompt = [chance.randrange(VOCABULARY) for _ in range(length)]
        kind = {"seed": i} | chance.choice(KINDS)
        yield Submit(f"r{i}", prompt, SamplingParams(max_tokens=num_output, **kind))


def different_in_company(model: Path, num_others: int = 64, **settings: Any) -> list[str]:
    """Which kinds of request get other tokens or log probabilities among others than alone."""
    core = _core(model, max_num_seqs=num_others + 1, deterministic=True, **settings)
    chance = random.Random(1)
    found = []
    for i, kind in enumerate(KINDS):
        prompt = [chance.randrange(VOCABULARY) for _ in range(20 + 10 * i)]
        fixed = {"max_tokens": 24, "ignore_eos": True, "seed": 5, "num_logprobs": 2}
        asked = Submit("asked", prompt, SamplingParams(**(fixed | kind)))
        alone = _answer(core, [asked])
        if _answer(core, [*_requests(num_others, chance), asked]) != alone:
            found.append(str(kind))
    return found


def _answer(core: EngineCore, submits: list[Submit]) -> list[tuple[object, ...]]:
    """What the last of them gets."""
    for submit in submits:
        core.submit(submit)
    answer: list[tuple[object, ...]] = []
    while core.has_work:
        record = core.step()
        for output in record.outputs if record else ():
            if output.request_id == submits[-1].request_id:
                rows = output.token_ids, output.logprobs, output.top_logprobs
                answer += [(output.index, *map(str, row)) for row in _by_token(*rows)]
    return sorted(answer, key=lambda row: int(str(row[0])))  # samples come side by side


def _by_token(*columns: Sequence[object] | None) -> Iterator[tuple[object, ...]]:
    """Records may bring one token or several."""
    num_tokens = len(columns[0] or ())
    return zip(*(column or [None] * num_tokens for column in columns), strict=True)


def _core(model: Path, **settings: Any) -> EngineCore:
    config = EngineConfig(
        model=str(model), max_model_len=CONTEXT_LEN, max_batched_tokens=128,
        max_decode_slowdown=0.0, block_size=BLOCK_SIZE, **settings,
    )  # fmt: skip
    return boot(config, Unheard(), lambda: None).core


if __name__ == "__main__":
    sys.exit(main())
