"""`pilotlight bench speculation`: the same answers with and without drafts. One JSON line out.

One model, one scheduler per mode, all modes in turn on every prompt: the tokens must be equal, and
the ratio of their times is what drafts bring. Texts that repeat themselves, code, and prose, where
the model's folder has a tokenizer; phrases of random tokens, repeated or not, where it has none.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

from ..engine.config import EngineConfig
from ..engine.core import EngineCore
from ..engine.found_weights import find_weights
from ..engine.messages import EngineStatistics, ModelFacts, Submit
from ..engine.sampling_params import SamplingParams
from ..engine.scheduler import Scheduler
from ..engine.speculation import MODES
from ..engine.worker.load import load_runner
from ..engine.worker.runner import Runner
from ..server.config import DEMO_MODEL
from ..server.text.tokenizer import load_tokenizer
from .throughput import SaidPhases

EPILOG = """\
examples:
  pilotlight bench speculation
  pilotlight bench speculation MODEL --num-seqs 1 4 16 --save bench/results/speculation
"""

BASE = "off"
TEXTS = {
    "repetitive": "one, two, three, four, " * 6,
    "code": """\
def area_of_square(side):
    return side * side

def area_of_circle(radius):
    return 3.14 * radius * radius

def area_of_rectangle(width, height):
    return width * height

def area_of_""",
    "prose": "The small flame that lets a furnace start at once is called",
}


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    bench = Bench(arguments)
    rows = [
        bench.compared(name, prompt, num_seqs)
        for num_seqs in arguments.num_seqs
        for name, prompt in bench.prompts.items()
    ]
    result = {
        "model": Path(arguments.model).resolve().name,
        "dtype": bench.facts.dtype,
        "temperature": arguments.temperature,
        "output_len": arguments.output_len,
        "rows": rows,
    }
    if arguments.save is not None:
        arguments.save.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        arguments.save.with_suffix(".md").write_text(table(result))
    print(table(result), file=sys.stderr)
    print(json.dumps(result))
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="pilotlight bench speculation",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = top.add_argument
    add("model", nargs="?", default=str(DEMO_MODEL), help="checkpoint folder (default: the demo)")
    add(
        "--num-seqs", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="each its own seed"
    )
    add("--output-len", type=int, default=96, metavar="TOKENS", help="(default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    add("--dtype", default="auto", choices=dtypes, help="(default: %(default)s)")
    add("--num-threads", type=int, default=0, metavar="N", help="0: as many as torch chooses")
    add("--repeat", type=int, default=3, metavar="N", help="runs of each; the median counts")
    add("--save", type=Path, metavar="PATH", help="also write PATH.json and PATH.md")
    return top


class Bench:
    """One runner, and for each mode a core that uses it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._max_num_seqs = max(arguments.num_seqs)
        config = EngineConfig(
            model=arguments.model,
            dtype=arguments.dtype,
            max_model_len=512,
            max_num_seqs=self._max_num_seqs,
            num_threads=arguments.num_threads,
        )
        weights = find_weights(config, Path(config.model))
        weights.start_moving()
        runner, self.facts = load_runner(config, weights, SaidPhases(), lambda: None)
        self._cores = {mode: self._core(runner, mode) for mode in MODES}
        self.prompts = prompts(arguments.model, self.facts)
        self._num_runs = 0

    def _core(self, runner: Runner, mode: str) -> EngineCore:
        scheduler = Scheduler(
            num_blocks=self.facts.num_blocks,
            block_size=self.facts.block_size,
            context_len=self.facts.context_len,
            eos_token_ids=self.facts.eos_token_ids,
            max_num_seqs=self._max_num_seqs,
            max_batched_tokens=2048,
            prefix_cache=False,
            speculative=mode,
        )
        return EngineCore(scheduler, runner)

    def compared(self, name: str, prompt: list[int], num_seqs: int) -> dict[str, object]:
        """Tokens per second of each mode. The first round records step sizes and does not count."""
        times: dict[str, list[float]] = {mode: [] for mode in MODES}
        counts: dict[str, EngineStatistics] = {}
        for _ in range(self._arguments.repeat + 1):
            answers = {}
            for mode, core in self._cores.items():
                before = core.statistics()
                elapsed_s, answers[mode] = self._run(core, prompt, num_seqs)
                times[mode].append(elapsed_s)
                counts[mode] = _difference(core.statistics(), before)
            if any(answer != answers[BASE] for answer in answers.values()):
                raise SystemExit(f"{name}: drafts changed an answer")
        num_tokens = num_seqs * self._arguments.output_len
        speeds = {mode: num_tokens / statistics.median(times[mode][1:]) for mode in MODES}
        row: dict[str, object] = {"prompt": name, "num_seqs": num_seqs}
        for mode in MODES:
            row[mode] = {
                "output_tokens_per_s": round(speeds[mode], 2),
                "speedup": round(speeds[mode] / speeds[BASE], 3),
                "num_steps": counts[mode].num_steps,
                "num_drafted": counts[mode].num_drafted_tokens,
                "num_accepted": counts[mode].num_accepted_tokens,
            }
        return row

    def _run(
        self, core: EngineCore, prompt: list[int], num_seqs: int
    ) -> tuple[float, list[list[int]]]:
        # The cores share one cache: none may find blocks that another has written over since.
        self._num_runs += 1
        ids = [f"{self._num_runs}-{i}" for i in range(num_seqs)]
        answers: dict[str, list[int]] = {request_id: [] for request_id in ids}
        for i, request_id in enumerate(ids):
            sampling = SamplingParams(
                max_tokens=self._arguments.output_len,
                temperature=self._arguments.temperature,
                ignore_eos=True,
                seed=i,
            )
            # Each begins with a token of its own: equal prompts would have equal answers.
            core.submit(Submit(request_id, [5 + i, *prompt], sampling))
        began_s = time.perf_counter()
        while core.has_work:
            record = core.step()
            for output in record.outputs if record else ():
                answers[output.request_id] += output.token_ids
        return time.perf_counter() - began_s, list(answers.values())


def prompts(model: str, facts: ModelFacts) -> dict[str, list[int]]:
    tokenizer = load_tokenizer(Path(model))
    if tokenizer is not None:
        return {
            name: tokenizer.encode(text, add_special_tokens=False) for name, text in TEXTS.items()
        }
    source = random.Random(0)
    tokens = [source.randrange(facts.vocab_size) for _ in range(72)]
    return {"repeated phrase": tokens[:12] * 6, "random": tokens}


def _difference(after: EngineStatistics, before: EngineStatistics) -> EngineStatistics:
    return EngineStatistics(
        num_steps=after.num_steps - before.num_steps,
        num_drafted_tokens=after.num_drafted_tokens - before.num_drafted_tokens,
        num_accepted_tokens=after.num_accepted_tokens - before.num_accepted_tokens,
    )


def table(result: dict[str, object]) -> str:
    """Markdown."""
    lines = [
        f"{result['model']}, {result['dtype']}, temperature {result['temperature']}, "
        f"{result['output_len']} tokens a sequence; the same answers in all modes.",
        "",
        "| prompt | sequences | off, tok/s | auto | ngram | auto: right of drafted | ngram |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = result["rows"]
    assert isinstance(rows, list)
    for row in rows:
        auto, ngram = row["auto"], row["ngram"]
        speed = row[BASE]["output_tokens_per_s"]
        lines.append(
            f"| {row['prompt']} | {row['num_seqs']} | {speed:.1f} | {auto['speedup']:.2f} x | "
            f"{ngram['speedup']:.2f} x | {auto['num_accepted']} of {auto['num_drafted']} | "
            f"{ngram['num_accepted']} of {ngram['num_drafted']} |"
        )
    return "\n".join(lines) + "\n"
