"""Triton's operations without a GPU: what they compute, in the interpreter; that they compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pilotlight.kernels import table

triton = pytest.importorskip("triton", reason="triton is not installed")

from pilotlight.kernels.invariant import linear  # noqa: E402
from pilotlight.kernels.triton import (  # noqa: E402
    add_rms_norm,
    paged_attention,
    quantized_linear,
    rms_norm,
    rope_store_kv,
    rope_store_kv_int8,
    sample,
    silu_mul,
)

X, F, I32, I8, FP8, INT = "*bf16", "*fp32", "*i32", "*i8", "*fp8e4nv", "i32"
"""Types of arguments as Triton's signatures spell them."""
KERNELS: dict[str, tuple[Any, list[str], dict[str, Any]]] = {
    "rms_norm": (rms_norm._rms_norm, [X, X, X, INT, INT, INT, "fp32"], {"WIDTH": 1024}),
    "add_rms_norm": (
        add_rms_norm._add_rms_norm, [X, X, X, X, INT, INT, INT, "fp32"], {"WIDTH": 1024}
    ),
    "silu_mul": (silu_mul._silu_mul, [X, X, INT, INT], {"WIDTH": 1024}),
    "sample": (
        sample._sample, [X, I32, F, "*fp64", I32, INT, INT],
        {"WIDTH": 4096, "WORDS": 6, "LOWEST_BIT": 16},
    ),
    "sample-fp32": (
        sample._sample, [F, I32, F, "*fp64", I32, INT, INT],
        {"WIDTH": 4096, "WORDS": 6, "LOWEST_BIT": 0},
    ),
    "rope_store_kv": (
        rope_store_kv._rope_store_kv, [X, X, X, F, I32, X, X, I32, *[INT] * 9], {"WIDTH": 64}
    ),
    "rope_store_kv_int8": (
        rope_store_kv_int8._rope_store_kv_int8,
        [X, X, X, F, I32, I8, I8, F, F, I32, *[INT] * 11], {"WIDTH": 64},
    ),
    "attend": (
        paged_attention._attend,
        [X, X, X, X, X, X, F, I32, I32, I32, "fp32", *[INT] * 13],
        {"GROUP": 4, "QUERIES": 4, "ROWS": 16, "KEYS": 32, "WIDTH": 128, "IS_SPLIT": True,
         "HAS_SCALES": False, "STEPS": 6, "PRECISION": "tf32"},
    ),
    "attend-int8": (
        paged_attention._attend,
        [X, I8, I8, F, F, X, F, I32, I32, I32, "fp32", *[INT] * 13],
        {"GROUP": 4, "QUERIES": 4, "ROWS": 16, "KEYS": 32, "WIDTH": 128, "IS_SPLIT": True,
         "HAS_SCALES": True, "STEPS": 6, "PRECISION": "tf32"},
    ),
    "attend-prompts": (
        paged_attention._attend,
        [X, X, X, X, X, X, F, I32, I32, I32, "fp32", *[INT] * 13],
        {"GROUP": 7, "QUERIES": 9, "ROWS": 64, "KEYS": 32, "WIDTH": 64, "IS_SPLIT": False,
         "HAS_SCALES": False, "STEPS": 6, "PRECISION": "tf32"},
    ),
    "linear-invariant": (
        linear._linear, [X, X, X, X, *[INT] * 4],
        {"ROWS": 64, "OUTPUTS": 64, "INPUTS": 64, "HAS_BIAS": True, "PRECISION": "tf32"},
    ),
    "join": (
        paged_attention._join,
        [F, X, I32, INT, INT, INT],
        {"SPLITS": 5, "SPLITS_WIDTH": 8, "WIDTH": 128},
    ),
    "quantized_linear": (
        quantized_linear._quantized_linear,
        [X, I32, F, F, I32, X, X, *[INT] * 7],
        {"BITS": 4, "PANEL": 16, "ROWS": 16, "OUTPUTS": 64, "INPUTS": 64, "HAS_ZEROS": True,
         "HAS_ORDER": True, "HAS_BIAS": True, "PRECISION": "tf32"},
    ),
}  # fmt: skip


def test_they_compute_what_the_reference_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pilotlight.tests.kernels.triton_trials"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=560)
    assert done.returncode == 0, done.stderr[-3000:]
    folders = [(op, name) for op, names in table.TABLE.items() for name in names]
    ours = [pair for pair in folders if pair[1] in ("triton", "invariant")]
    assert all(f"{op}, {folder}, torch.float16" in done.stdout for op, folder in ours)


ON_HOPPER = {
    "rope_store_kv-fp8": (
        rope_store_kv._rope_store_kv, [X, X, X, F, I32, FP8, FP8, I32, *[INT] * 9], {"WIDTH": 64}
    ),
    "attend-fp8": (
        paged_attention._attend,
        [X, FP8, FP8, X, X, X, F, I32, I32, I32, "fp32", *[INT] * 13],
        {"GROUP": 4, "QUERIES": 4, "ROWS": 16, "KEYS": 32, "WIDTH": 128, "IS_SPLIT": True,
         "HAS_SCALES": False, "STEPS": 6, "PRECISION": "tf32"},
    ),
}  # fmt: skip
COMPILED = [(name, 80) for name in KERNELS] + [(name, 90) for name in KERNELS | ON_HOPPER]


@pytest.mark.parametrize(("name", "capability"), COMPILED)
def test_they_compile_for_devices_that_are_not_here(
    name: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants = (KERNELS | ON_HOPPER)[name]
    arguments = [n for n in kernel.arg_names if n not in constants]
    signature = dict(zip(arguments, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]


def test_they_are_for_cuda_and_elsewhere_not_even_looked_at() -> None:
    implementation = table.Implementation("rms_norm", "triton")
    assert implementation.supported(torch.device("cuda"), torch.bfloat16)
    assert not implementation.supported(torch.device("cpu"), torch.bfloat16)
    code = (
        "import sys, torch; from pilotlight.kernels.table import bind;"
        "bind(torch.device('cpu'), torch.float32);"
        "print([m for m in sys.modules if m.startswith('pilotlight.kernels.triton')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
