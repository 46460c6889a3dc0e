"""The parts of `bench/gpu.py`, each in a process of its own: what one breaks, no other sees.

    python -m pilotlight.bench.gpu_sections NAME PLAN

prints one JSON line. PLAN is the JSON of a Plan.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import torch

from ..kernels import check, table
from ..kernels.reference.case import Case
from ..kernels.reference.paged_attention import Batch
from ..kernels.triton.tiles import Tiles, candidates
from .gpu_engine import Engine
from .gpu_limits import Limits, measured, median_s
from .make_model import SHAPES, Shape, write_model

ROOT = Path(__file__).resolve().parent.parent
FLUSH_BYTES = 256 << 20
"""More than the second-level cache of any device."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is done; the defaults are meant for a device with 80 GB or more."""

    model: str
    shape: str = "llama-3.1-8b"
    device: str = "cuda"
    dtype: str = "bfloat16"
    batches: tuple[int, ...] = (1, 8, 32, 128, 256)
    decode_context: int = 64
    prompts: tuple[int, ...] = (512, 4096, 32768)
    many: tuple[int, int, int] = (128, 32, 2048)
    peer_many: tuple[int, int, int] = (128, 32, 256)
    trace: str = ""
    trace_requests: int = 400
    limit_bytes: int = 4 << 30
    matrix: int = 8192
    parity_shapes: tuple[str, ...] = ("tiny-llama-gqa", "tiny-mistral", "tiny-qwen2", "tiny-qwen3")
    startups: int = 3
    tiles_s: float = 90.0
    stress_requests: int = 1000
    memcheck_requests: int = 1000


def limits(plan: Plan) -> dict[str, Any]:
    return asdict(measured(torch.device(plan.device), plan.limit_bytes, plan.matrix))


# ---- kernels -------------------------------------------------------------------------------------


def kernels(plan: Plan) -> dict[str, Any]:
    """Every implementation of the device against the reference; those worth it are timed."""
    device = torch.device(plan.device)
    ceilings = measured(device, plan.limit_bytes, plan.matrix)
    failures, timings, num_checked = [], [], 0
    for implementation, dtype, case in _trials(device):
        name = f"{implementation.op}/{case.name}/{_name(dtype)}"
        try:
            if not implementation.accepts(*case.make(device, dtype)):
                continue
            wanted = check.expected(implementation.op, case, device, dtype)
            actual = check.outcome(implementation.function(), case.make(device, dtype))
            check.assert_close(actual, wanted, dtype)
            num_checked += 1
            if case.is_timed and dtype is torch.bfloat16:
                timings.append(_timing(implementation, case, dtype, device, ceilings))
        except Exception as error:  # every one is told, none ends the others
            failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    return {"num_checked": num_checked, "failures": failures, "timings": timings}


def _trials(
    device: torch.device,
) -> Iterator[tuple[table.Implementation, torch.dtype, Case]]:
    for op in table.TABLE:
        cases = list(table.Implementation(op, "reference").module().cases())
        for dtype in (torch.bfloat16, torch.float32):
            for implementation in table.implementations(op):
                if implementation.name != "reference" and implementation.supported(device, dtype):
                    usable = (case for case in cases if dtype in case.dtypes)
                    yield from ((implementation, dtype, case) for case in usable)


def _timing(
    implementation: table.Implementation,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    ceilings: Limits,
) -> dict[str, Any]:
    arguments = case.make(device, dtype)
    cost = table.Implementation(implementation.op, "reference").module().cost(*arguments)
    flush = torch.empty(FLUSH_BYTES // 4, device=device)
    function = implementation.function()
    seconds = median_s(lambda: function(*arguments), device, before=flush.zero_)
    least_s = ceilings.least_s(cost.num_bytes, cost.num_flops)
    about = {"op": implementation.op, "case": case.name, "way": implementation.name}
    return about | {"us": seconds * 1e6, "share": least_s / seconds}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tiles(plan: Plan) -> dict[str, Any]:
    """Tiles of Triton's attention that are right on this device, the fastest first."""
    device = torch.device(plan.device)
    if device.type != "cuda":
        return {"skipped": "tiles are timed on a CUDA device"}
    shape, until_s = SHAPES[plan.shape], time.monotonic() + plan.tiles_s
    lengths = {"decodes": [(1, 4096)] * 32, "prompt": [(4096, 4096)]}
    return {
        name: tried(_attention_by_tiles(shape, sequences, device), candidates(is_decode), until_s)
        for (name, sequences), is_decode in zip(lengths.items(), (True, False), strict=True)
    }


def _attention_by_tiles(
    shape: Shape, sequences: list[tuple[int, int]], device: torch.device
) -> Callable[[Tiles | None], tuple[torch.Tensor, float]]:
    from ..kernels.triton.paged_attention import attend

    batch = Batch(
        sequences, shape.num_heads, shape.num_kv_heads, shape.head_dim, is_scattered=False
    )
    arguments: Any = Case("tiles", batch).make(device, torch.bfloat16)
    q, keys, values, *lists, scale, window = arguments
    flush = torch.empty(FLUSH_BYTES // 4, device=device)

    def run(chosen: Tiles | None) -> tuple[torch.Tensor, float]:
        def call() -> torch.Tensor:
            return attend(q, keys, values, None, tuple(lists), scale, window, tiles=chosen)

        return call(), median_s(call, device, before=flush.zero_)

    return run


def tried(
    run: Callable[[Tiles | None], tuple[torch.Tensor, float]],
    candidates: Iterable[Tiles],
    until_s: float,
) -> dict[str, Any]:
    """What is not right, or does not fit the device, is told with its reason."""
    wanted, now_s = run(None)
    timed: list[tuple[float, str]] = []
    failures: list[str] = []
    for chosen in candidates:
        if time.monotonic() > until_s:
            break
        try:
            actual, seconds = run(chosen)
            check.assert_close([actual], [wanted], actual.dtype)
            timed.append((seconds * 1e6, str(chosen)))
        except Exception as error:  # one that does not fit ends no other
            failures.append(f"{chosen}: {type(error).__name__}: {str(error)[:200]}")
    return {"now_us": now_s * 1e6, "best": sorted(timed)[:8], "failures": failures}


# ---- the engine ----------------------------------------------------------------------------------


def parity(plan: Plan) -> dict[str, Any]:
    """Greedy tokens in fp32 against transformers' on the same device: how many are equal."""
    return {shape: _parity_of(shape, plan.device) for shape in plan.parity_shapes}


def _parity_of(shape: str, device: str) -> dict[str, int]:
    from transformers import AutoModelForCausalLM

    prompts = [[1 + (7 * i + 3 * j) % 400 for j in range(n)] for i, n in enumerate((1, 9, 40, 70))]
    with tempfile.TemporaryDirectory() as folder:
        write_model(shape, Path(folder), dtype="float32")
        engine = Engine(
            Path(folder), device, dtype="float32", max_model_len=200, kv_cache_bytes=64 << 20
        )
        ours = engine.tokens(prompts, 40)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    model.generation_config.eos_token_id = None
    num_equal = num_all = 0
    for prompt, tokens in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt], device=device)
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        expected = whole[0, len(prompt) :].tolist()
        num_equal += sum(a == b for a, b in zip(tokens, expected, strict=True))
        num_all += len(expected)
    return {"num_equal": num_equal, "num_tokens": num_all}


def decode(plan: Plan) -> dict[str, Any]:
    engine = _engine(plan, max(plan.batches), plan.decode_context + 128)
    engine.capture_all()
    steps = [engine.decode(batch, plan.decode_context) for batch in plan.batches]
    return engine.facts() | {"steps": steps}


def prefill(plan: Plan) -> dict[str, Any]:
    engine = _engine(plan, 4, max(plan.prompts) + 16, max_batched_tokens=8192)
    return {"prompts": [engine.prefill(length) for length in plan.prompts]}


def throughput(plan: Plan) -> dict[str, Any]:
    num_seqs, input_len, output_len = plan.many
    engine = _engine(plan, num_seqs, input_len + output_len)
    engine.capture_all()
    return {"many": list(plan.many)} | engine.throughput(*plan.many)


def trace(plan: Plan) -> dict[str, Any]:
    if not plan.trace:
        return {"skipped": "no trace was given (--trace)"}
    engine = _engine(plan, max(plan.batches), 8192)
    engine.capture_all()
    return engine.traced(Path(plan.trace), plan.trace_requests, speed=float("inf"))


def _engine(plan: Plan, max_num_seqs: int, max_model_len: int, **settings: Any) -> Engine:
    return Engine(
        Path(plan.model),
        plan.device,
        dtype=plan.dtype,
        max_num_seqs=max_num_seqs,
        max_model_len=min(max_model_len, SHAPES[plan.shape].context_len),
        **({"max_batched_tokens": max(2048, max_num_seqs)} | settings),
    )


# ---- others --------------------------------------------------------------------------------------


def startup(plan: Plan) -> dict[str, Any]:
    """The real command, from the moment before it is spawned; its artefact in memory, as the
    model is."""
    command = [sys.executable, "-m", "pilotlight", "bench", "startup", plan.model]
    command += ["--repeat", str(plan.startups)]
    with tempfile.TemporaryDirectory(dir=Path(plan.model).parent) as cache:
        command += ["--cache", cache]
        return _last_json(subprocess.run(command, capture_output=True, text=True, check=False))


def tests(plan: Plan) -> dict[str, Any]:
    """Those that need a device."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"rc": done.returncode, "tail": (done.stdout + done.stderr)[-2000:]}


def stress(plan: Plan) -> dict[str, Any]:
    """Mixed requests with aborts, and the same request in other company: see stress.py."""
    return _last_json(_run_stress(plan, [], plan.stress_requests))


def memcheck(plan: Plan) -> dict[str, Any]:
    """Fewer of them, each access to the device's memory checked."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or plan.device != "cuda":
        return {"skipped": "there is no compute-sanitizer, or no device for it"}
    checked = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
    return _last_json(_run_stress(plan, checked, plan.memcheck_requests))


def _run_stress(plan: Plan, under: list[str], num: int) -> subprocess.CompletedProcess[str]:
    command = [*under, sys.executable, "-m", f"{__package__}.stress", "--device", plan.device]
    command += ["--dtype", plan.dtype, "--num-requests", str(num)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def peer(plan: Plan) -> dict[str, Any]:
    """transformers' continuous batching on the same model and lengths."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    num_seqs, input_len, output_len = plan.peer_many
    model = AutoModelForCausalLM.from_pretrained(
        plan.model, dtype=getattr(torch, plan.dtype), attn_implementation="sdpa"
    )
    model = model.to(plan.device).eval()
    config = GenerationConfig(
        max_new_tokens=output_len, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    prompts = [[1 + (i + j) % 1000 for j in range(input_len)] for i in range(num_seqs)]
    model.generate_batch(prompts[:2], generation_config=config, progress_bar=False)
    began_s = time.perf_counter()
    outputs = model.generate_batch(prompts, generation_config=config, progress_bar=False)
    spent_s = time.perf_counter() - began_s
    num_tokens = sum(len(output.generated_tokens) for output in outputs.values())
    del model
    ours = _engine(plan, num_seqs, input_len + output_len)
    ours.capture_all()
    own = ours.throughput(*plan.peer_many)["output_tokens_per_s"]
    rate = num_tokens / spent_s
    return {
        "many": list(plan.peer_many),
        "transformers_tokens_per_s": rate,
        "pilotlight_tokens_per_s": own,
        "ratio": own / rate,
    }


def _last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"rc": done.returncode, "tail": (done.stdout + done.stderr)[-2000:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


SECTIONS: Mapping[str, Callable[[Plan], dict[str, Any]]] = {
    section.__name__: section
    for section in (
        limits, kernels, parity, tests, stress, decode, prefill, throughput, peer, trace, startup,
        tiles, memcheck,
    )
}  # fmt: skip
"""In the order of what one wants to know first."""


if __name__ == "__main__":
    print(json.dumps(SECTIONS[sys.argv[1]](msgspec.json.decode(sys.argv[2], type=Plan))))
