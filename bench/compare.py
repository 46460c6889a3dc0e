"""`pilotlight bench compare`: our engine and others on the same cases, in turn, in one run.

Each engine is a child that has loaded the model once and waits for its next case; while one runs
the others sleep. Knows the children's lines, and how to print; knows no engine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.errors import ConfigError
from .startup_peers import DRIVERS, PEERS, Peer, check_has, converted, python_of

OURS = "pilotlight"
OTHERS = PEERS | {"llamacpp": Peer("llamacpp", "llama_cpp")}
CASES = ("1x16x64", "32x128x64", "1x512x1")
LOAD_TIMEOUT_S = 300.0
READ_BYTES = 768 << 20
UNCOUNTED_LEN = 8
"""Tokens of the uncounted run's answers, at most: it brings kernels and memory to their state of
use, and is not long for cases that are."""
EPILOG = """\
A case is SEQUENCES x INPUT x OUTPUT tokens, all sequences at once; its figure is output tokens per
second, prompts included. Each engine runs a shorter case once uncounted. Weights are bfloat16,
unless --peer-dtype says otherwise for a peer: on processors without bfloat16 some are faster in
float32; or what the model given by --peer-model has. llama.cpp needs that: a GGUF file.

limit is what weights alone allow one sequence: the machine's read rate, measured between the cases,
over the bytes of a step. ratio is ours over the best of the others. The last line is JSON.

examples:
  pilotlight bench compare MODEL --vs openvino,transformers --case 1x16x64 --case 32x128x64
  pilotlight bench compare MODEL --vs vllm --peer-python vllm=/opt/vllm/bin/python \\
      --peer-dtype vllm=float32
  pilotlight bench compare INT4 --vs llamacpp --peer-model llamacpp=q4_0.gguf
"""


class Case(NamedTuple):
    num_seqs: int
    input_len: int
    output_len: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    cases = [case_of(text) for text in arguments.case or CASES]
    with ExitStack() as stack:
        children = [stack.enter_context(child) for child in _children(arguments)]
        for child in children:
            child.wait_loaded()
        seconds, reads = measure(children, cases, arguments.repeat)
    result = report(seconds, reads, weight_bytes(Path(arguments.model)), arguments.model)
    lines = table(result)
    print("\n".join(lines), file=sys.stderr)
    if arguments.save:
        Path(f"{arguments.save}.json").write_text(json.dumps(result, indent=1) + "\n")
        Path(f"{arguments.save}.md").write_text("\n".join(lines) + "\n")
    print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pilotlight bench compare",
        description="Run the same cases by our engine and by others, in turn.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint folder")
    add("--vs", default="", metavar="PEERS", help=f"of {','.join(OTHERS)}")
    add("--case", action="append", metavar="NxINxOUT", help=f"repeatable (default: {CASES})")
    add("--repeat", type=int, default=3, metavar="N", help="counted runs (default: %(default)s)")
    add("--peer-python", action="append", default=[], metavar="PEER=PYTHON",
        help="interpreter that has the peer (default: python3 on PATH)")  # fmt: skip
    add("--peer-dtype", action="append", default=[], metavar="PEER=DTYPE")
    add("--peer-model", action="append", default=[], metavar="PEER=PATH",
        help="in the peer's own form (default: MODEL, converted for openvino)")  # fmt: skip
    add("--save", metavar="PATH", help="also write PATH.json and PATH.md")
    return parser


def case_of(text: str) -> Case:
    try:
        case = Case(*map(int, text.split("x")))
    except (TypeError, ValueError):
        raise ConfigError(
            f"--case is {text!r}: give SEQUENCESxINPUTxOUTPUT, as 32x128x64"
        ) from None
    if min(case) < 1 or case.num_seqs > 64:
        raise ConfigError(f"--case is {text!r}: 1 to 64 sequences, tokens from 1 on")
    return case


# ---- children ------------------------------------------------------------------------------------


class Child:
    """An engine in a process of its own."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._command = command
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        # With its own children: as long as one of them lives, the pipe has no end.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def wait_loaded(self) -> None:
        began_s = time.monotonic()
        while self._answer().get("moment") != "loaded":
            pass
        print(
            f"pilotlight: {self.name} loaded ({time.monotonic() - began_s:.1f} s)", file=sys.stderr
        )

    def run(self, case: Case, seed: int) -> float:
        """Seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{case.num_seqs} {case.input_len} {case.output_len} {seed}\n")
        self._process.stdin.flush()
        while "s" not in (answer := self._answer()):
            pass
        return float(answer["s"])

    def _answer(self) -> dict[str, Any]:
        """The next line that is ours among what libraries print."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise ConfigError(f"{self.name} ended ({self._process.wait()}): {' '.join(self._command)}")


def _children(arguments: argparse.Namespace) -> list[Child]:
    ours = (sys.executable, "-m", "pilotlight.bench.compare_ours", arguments.model, "bfloat16")
    commands: dict[str, tuple[str, ...]] = {OURS: ours}
    for name in filter(None, arguments.vs.split(",")):
        commands[name] = _peer_command(name, arguments)
    return [Child(name, command) for name, command in commands.items()]


def _peer_command(name: str, arguments: argparse.Namespace) -> tuple[str, ...]:
    if name not in OTHERS:
        raise ConfigError(f"--vs: {name!r} is unknown; there are {', '.join(OTHERS)}")
    peer = OTHERS[name]
    python = python_of(peer, _pairs(arguments.peer_python))
    check_has(peer, python)
    model = Path(_pairs(arguments.peer_model).get(name, arguments.model))
    if name == "llamacpp" and not model.is_file():
        raise ConfigError(f"--vs llamacpp: {model} is no GGUF file; --peer-model llamacpp=FILE")
    folder = converted(python, model) if name == "openvino" else model
    dtype = _pairs(arguments.peer_dtype).get(name, "auto" if name == "openvino" else "bfloat16")
    driver = DRIVERS / f"runs_{name}.py"
    return ("env", "-u", "PYTHONPATH", *peer.variables, python, str(driver), str(folder), dtype)


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    return dict(text.split("=", 1) for text in texts if "=" in text)


# ---- runs ----------------------------------------------------------------------------------------


def measure(
    children: Sequence[Child], cases: Sequence[Case], repeat: int
) -> tuple[dict[str, dict[str, list[float]]], list[float]]:
    """Case -> engine -> seconds; and the read rates met in between."""
    seconds: dict[str, dict[str, list[float]]] = {}
    reads = []
    for case in cases:
        found: dict[str, list[float]] = {child.name: [] for child in children}
        for child in children:
            child.run(case._replace(output_len=min(case.output_len, UNCOUNTED_LEN)), 0)
        for number in range(1, repeat + 1):
            reads.append(read_bytes_per_s())
            for child in random.Random(number).sample(list(children), len(children)):
                spent_s = child.run(case, number)
                found[child.name].append(spent_s)
                print(f"pilotlight: {case} {child.name:<13}{spent_s:9.3f} s", file=sys.stderr)
        seconds[str(case)] = found
    return seconds, reads


def read_bytes_per_s() -> float:
    """Of memory, by all threads: the best of a few passes over more than any cache holds."""
    import torch

    x = torch.ones(READ_BYTES // 4)
    passes_s = []
    for _ in range(4):
        began_s = time.perf_counter()
        x.sum()
        passes_s.append(time.perf_counter() - began_s)
    return READ_BYTES / min(passes_s)


def weight_bytes(model: Path) -> int:
    """What a step of one sequence reads: the checkpoint's tensors, a tied table once."""
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def report(
    seconds: dict[str, dict[str, list[float]]], reads: list[float], num_bytes: int, model: str
) -> dict[str, Any]:
    read = statistics.median(reads)
    cases: dict[str, Any] = {}
    for text, found in seconds.items():
        case = case_of(text)
        num_tokens = case.num_seqs * case.output_len
        rates = {
            name: {
                "median": round(num_tokens / statistics.median(spent), 4),
                "min": round(num_tokens / max(spent), 4),
                "max": round(num_tokens / min(spent), 4),
            }
            for name, spent in found.items()
        }
        others = [rate["median"] for name, rate in rates.items() if name != OURS]
        cases[text] = {
            "output_tokens_per_s": rates,
            "s": {name: round(statistics.median(spent), 3) for name, spent in found.items()},
        }
        if others:
            cases[text]["ratio"] = round(rates[OURS]["median"] / max(others), 3)
    return {
        "model": Path(model).name,
        "weight_bytes": num_bytes,
        "read_bytes_per_s": round(read),
        "read_spread": [round(min(reads)), round(max(reads))],
        "limit_tokens_per_s": round(read / num_bytes, 2),
        "cases": cases,
    }


def table(result: dict[str, Any]) -> list[str]:
    names = list(next(iter(result["cases"].values()))["output_tokens_per_s"])
    lines = [
        f"Output tokens per second, {result['model']}; memory reads "
        f"{result['read_bytes_per_s'] / 1e9:.1f} GB/s, which allows one sequence "
        f"{result['limit_tokens_per_s']} tokens/s.",
        "",
        f"| case | {' | '.join(names)} | ratio to the best other |",
        "|---" * (len(names) + 2) + "|",
    ]
    for case, found in result["cases"].items():
        rates = found["output_tokens_per_s"]
        cells = ["{median:.2f} ({min:.2f} to {max:.2f})".format(**rates[name]) for name in names]
        if case.endswith("x1"):  # a prompt alone: rates of one token say little
            cells = [f"{found['s'][name]} s" for name in names]
        lines.append(f"| {case} | {' | '.join(cells)} | {found.get('ratio', '')} |")
    return lines
