"""Everything that is to be known of one device, in one run: right first, then how fast.

    python -m pilotlight.bench.gpu --out gpu.json [--model FOLDER] [--trace FILE]

Parts run in processes of their own, in the order of what one wants to know first, until the
deadline; what is known is written after each. Without --model a random one of --shape is made in
memory (/dev/shm). `--dry` is the same on a CPU with a tiny model: whether the script works.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec.structs import asdict, replace

from .gpu_report import report
from .gpu_sections import SECTIONS, Plan
from .make_model import SHAPES, write_model

DRY: dict[str, Any] = {
    "shape": "tiny-llama-gqa",
    "device": "cpu",
    "dtype": "float32",
    "batches": (1, 3),
    "prompts": (16, 40),
    "many": (3, 8, 16),
    "peer_many": (2, 8, 8),
    "trace_requests": 5,
    "limit_bytes": 1 << 20,
    "matrix": 128,
    "parity_shapes": ("tiny-llama-gqa",),
    "startups": 1,
    "stress_requests": 20,
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    deadline_s = time.monotonic() + arguments.deadline
    plan = Plan(model="", shape=arguments.shape, device=arguments.device, trace=arguments.trace)
    plan = replace(plan, **DRY) if arguments.dry else plan
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
        plan = replace(plan, model=arguments.model or _made(plan.shape, Path(folder)))
        found = {"machine": machine(plan.device), "plan": asdict(plan)}
        for name in arguments.only or SECTIONS:
            found[name] = run(name, plan, deadline_s)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    table = report(found)
    arguments.out.with_suffix(".md").write_text(table)
    print(table)
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m pilotlight.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = top.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="JSON; a table goes beside it")
    add("--model", default="", metavar="FOLDER", help="a checkpoint of --shape")
    add("--shape", default="llama-3.1-8b", choices=sorted(SHAPES))
    add("--device", default="cuda")
    add("--trace", default="", metavar="FILE", help="of real requests, replayed all at once")
    add("--deadline", type=float, default=470.0, metavar="SECONDS", help="of all parts together")
    add("--only", action="append", choices=list(SECTIONS), metavar="PART", help="may be repeated")
    add("--dry", action="store_true", help="a tiny model on the CPU")
    return top


def run(name: str, plan: Plan, deadline_s: float) -> dict[str, Any]:
    """What one part found, or why it found nothing."""
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        return {"skipped": "the deadline was over"}
    print(f"pilotlight: {name} ({left_s:.0f} s left)", file=sys.stderr)
    command = [sys.executable, "-m", f"{__package__}.gpu_sections", name]
    command.append(msgspec.json.encode(plan).decode())
    began_s = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left_s, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not over after {left_s:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"failed": (done.stdout + done.stderr)[-3000:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found | {"took_s": round(time.monotonic() - began_s, 1)}


def machine(device: str) -> Mapping[str, str]:
    about = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda" and torch.cuda.is_available():
        about |= {"card": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        asked = subprocess.run(query, capture_output=True, text=True, check=False)
        about["driver"] = asked.stdout.strip()
    head = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False)
    return about | {"commit": commit.stdout.strip(), "command": " ".join(sys.argv[1:])}


def _made(shape: str, folder: Path) -> str:
    print(f"pilotlight: making a model of shape {shape}", file=sys.stderr)
    write_model(shape, folder)
    return str(folder)


def _memory_folder() -> str | None:
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() else None


if __name__ == "__main__":
    sys.exit(main())
