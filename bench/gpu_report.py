"""What `bench/gpu.py` found, as tables: each figure beside the limit of the same run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .gpu_limits import Limits
from .make_model import SHAPES, Shape


def report(found: Mapping[str, Any]) -> str:
    about = ", ".join(f"{key} {value}" for key, value in found["machine"].items() if value)
    parts = [f"{about}\n"]
    limits = _limits(found.get("limits", {}))
    shape = SHAPES[found["plan"]["shape"]]
    for name, told in found.items():
        if name not in ("machine", "plan"):
            parts.append(f"\n## {name}\n\n" + _part(name, told, limits, shape))
    return "".join(parts)


def _limits(told: Mapping[str, Any]) -> Limits | None:
    fields = Limits.__dataclass_fields__
    return Limits(**{name: told[name] for name in fields}) if set(fields) <= set(told) else None


def _part(name: str, told: Mapping[str, Any], limits: Limits | None, shape: Shape) -> str:
    for state in ("skipped", "failed"):
        if state in told:
            return f"{state}: {told[state]}\n"
    match name:
        case "kernels":
            return _kernels(told)
        case "decode":
            return _decode(told, limits)
        case "prefill":
            return _prefill(told, limits, shape)
        case "tiles":
            return _tiles(told)
    return _table(("figure", "value"), ((key, _shown(value)) for key, value in told.items()))


def _kernels(told: Mapping[str, Any]) -> str:
    failures = "".join(f"- {failure}\n" for failure in told["failures"])
    rows = [(t["op"], t["case"], t["way"], f"{t['us']:.1f}", f"{t['share']:.2f}")
            for t in told["timings"]]  # fmt: skip
    counts = f"{told['num_checked']} checked, {len(told['failures'])} wrong\n\n"
    return counts + failures + _table(("operation", "case", "way", "us", "of limit"), rows)


def _decode(told: Mapping[str, Any], limits: Limits | None) -> str:
    rows = []
    for step in told["steps"]:
        least_s = limits.least_s(told["weight_bytes"]) if limits else 0.0
        busy = f"{step['busy']:.2f}" if "busy" in step else ""
        share = f"{least_s / step['step_s']:.2f}" if limits else ""
        rate = f"{step['tokens_per_s']:.0f}"
        rows.append((step["batch"], f"{step['step_s'] * 1e3:.2f}", rate, share, busy))
    heads = ("batch", "step ms", "tokens/s", "weights' bytes of step", "device busy")
    phases = ", ".join(f"{name} {spent_s:.2f}" for name, spent_s in told["phases_s"].items())
    return _table(heads, rows) + f"\nBoot, seconds: {phases}\n"


def _prefill(told: Mapping[str, Any], limits: Limits | None, shape: Shape) -> str:
    rows = []
    for prompt in told["prompts"]:
        length, seconds = prompt["input_len"], prompt["seconds"]
        share = prefill_flops(shape, length) / limits.bf16_flops / seconds if limits else 0.0
        rows.append(
            (length, f"{seconds * 1e3:.1f}", f"{prompt['tokens_per_s']:.0f}", f"{share:.2f}")
        )
    return _table(("tokens", "ms", "tokens/s", "of matmul peak"), rows)


def _tiles(told: Mapping[str, Any]) -> str:
    rows = [
        (name, f"{spent_us:.1f}", chosen)
        for name, found in told.items()
        if isinstance(found, Mapping)
        for spent_us, chosen in ((found["now_us"], "in use"), *found["best"])
    ]
    return _table(("attention of", "us", "tiles"), rows)


def prefill_flops(shape: Shape, length: int) -> float:
    """Two per weight and token, the head's once, and causal attention's half of a square."""
    hidden, heads = shape.hidden_size, shape.num_heads * shape.head_dim
    keys = shape.num_kv_heads * shape.head_dim
    layer = hidden * (heads + 2 * keys) + heads * hidden + 3 * hidden * shape.intermediate_size
    attention = 2 * 2 * heads * length * length / 2
    return shape.num_layers * (2 * layer * length + attention) + 2 * hidden * shape.vocab_size


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
