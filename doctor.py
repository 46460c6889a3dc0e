"""`pilotlight doctor`: what this machine has, what Pilotlight will use, and why.

Reads the machine; changes nothing. Each finding is a name, a value, and a reason or a remedy.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from .engine.host_cpus import usable_cpus
from .engine.lean_torch import has_cuda_driver
from .engine.worker.load import dtype_name
from .engine.worker.memory import available_bytes
from .kernels.cpu import native
from .kernels.flash.paged_attention import installed as flash_versions
from .kernels.table import bind, implementations
from .server.config import DEMO_MODEL, cache_root

LIBRARIES = ("torch", "triton", "tokenizers", "safetensors", "grpcio", "msgspec", "uvloop")


@dataclass(frozen=True, slots=True)
class Finding:
    section: str
    name: str
    value: str
    why: str = ""


def main(as_json: bool) -> int:
    findings = [*machine(), *libraries(), *devices(), *native_library(), *kernels(), *files()]
    if as_json:
        fields = ("section", "name", "value", "why")
        print(json.dumps([{f: getattr(finding, f) for f in fields} for finding in findings]))
    else:
        print(as_text(findings))
    return 0


def as_text(findings: list[Finding]) -> str:
    lines, section = [], ""
    width = max(len(finding.name) for finding in findings) + 2
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section]
        why = f"  ({finding.why})" if finding.why else ""
        lines.append(f"  {finding.name:<{width}}{finding.value}{why}")
    return "\n".join(lines[1:])


def machine() -> list[Finding]:
    free = available_bytes(torch.device("cpu")) / 2**30
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding("machine", "system", f"{platform.system()} {platform.machine()}"),
        Finding("machine", "python", platform.python_version()),
        Finding("machine", "cores", str(usable), "those this process may use"),
        Finding("machine", "free memory", f"{free:.1f} GiB", "within the cgroup's limit"),
    ]


def libraries() -> list[Finding]:
    return [Finding("libraries", name, _version(name)) for name in LIBRARIES]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def auto_device() -> torch.device:
    return torch.device("cuda" if has_cuda_driver() and torch.cuda.is_available() else "cpu")


def devices() -> list[Finding]:
    device = auto_device()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        found = Finding("device", "auto", f"cuda: {name}", "a usable CUDA device was found")
        versions = ", ".join(version.module for version in flash_versions()) or "not installed"
        return [found, Finding("device", "flash-attn", versions, "the first that suits is used")]
    why = "this torch has no CUDA" if torch.version.cuda is None else "no usable CUDA device"
    num_threads = min(torch.get_num_threads(), usable_cpus())
    why_so_many = "one for each core that may be used"
    threads = Finding("device", "threads", str(num_threads), why_so_many)
    return [Finding("device", "auto", "cpu", why), threads]


def native_library() -> list[Finding]:
    reason = native.missing_reason()
    if reason:
        return [Finding("native kernels", "library", "not in use", reason)]
    levels = ", ".join(native.levels())
    return [
        Finding("native kernels", "library", str(native.LIBRARY_PATH)),
        Finding(
            "native kernels", "level", native.level() or "", f"the best of those that run: {levels}"
        ),
    ]


def kernels() -> list[Finding]:
    """What each operation is bound to, for both dtypes of a CPU or those of CUDA."""
    device, findings = auto_device(), []
    for dtype in (torch.bfloat16, torch.float32):
        for op, choice in bind(device, dtype).choices.items():
            usable = [i for i in implementations(op) if i.supported(device, dtype)]
            others = [i.name for i in usable if i.name not in choice.split()]
            why = f"also there: {', '.join(others)}" if others else "the only one"
            findings.append(Finding(f"operations in {dtype_name(dtype)}", op, choice, why))
    return findings


def files() -> list[Finding]:
    has_demo = (DEMO_MODEL / "model.safetensors").exists()
    return [
        Finding("files", "demo model", str(DEMO_MODEL) if has_demo else "missing"),
        Finding("files", "cache", str(cache_root()), "PILOTLIGHT_CACHE overrides it"),
    ]
