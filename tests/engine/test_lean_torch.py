"""torch imported for computing only computes what a whole one does, and nothing else by mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pilotlight.kernels.cpu import native

PREAMBLE = "from pilotlight.engine import lean_torch; from pilotlight.engine.lean_torch import *\n"
WHAT_IS_THERE = """
import sys
parents = lambda name: (name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1))
lean_torch.import_lean()
torch_modules = {name for name in sys.modules if name.partition(".")[0] == "torch"}
answers = {name for answer in ANSWERS for name in (answer, *parents(answer))}
"""


def _run(program: str) -> str:
    command = (sys.executable, "-c", PREAMBLE + program)
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_nothing_is_imported_but_what_is_kept() -> None:
    program = WHAT_IS_THERE + (
        "import torch\n"
        "left = {n for n in torch_modules if not is_kept(n)} - answers\n"
        "print(sorted(left))"
    )
    assert _run(program) == "['torch.classes', 'torch.ops']"


def test_no_stand_in_is_left_behind() -> None:
    program = WHAT_IS_THERE + (
        "modules = [sys.modules[name] for name in torch_modules]\n"
        "found = [m for m in modules if isinstance(m, StandIn)]\n"
        "values = [v for m in modules for v in vars(m).values()]\n"
        "print(found, [v for v in values if lean_torch._is_stand_in(v)])"
    )
    assert _run(program) == "[] []"


def test_what_is_not_there_is_an_error() -> None:
    program = (
        "import_lean(); import torch\n"
        "for use in ('torch.compile(len)', 'torch.nn.Linear(1, 1)', 'torch.cuda.synchronize()'):\n"
        "    try: print(eval(use))\n"
        "    except (AttributeError, NameError, ImportError): print('an error')"
    )
    assert _run(program).split("\n") == ["an error"] * 3


def test_a_whole_torch_stays_whole() -> None:
    program = "import sys, torch; import_lean(); print('torch.optim' in sys.modules)"
    assert _run(program) == "True"


def test_a_version_that_was_not_tried_is_imported_whole() -> None:
    program = (
        "import sys; lean_torch.LEAN_VERSIONS = ()\n"
        "import_lean(); print('torch.optim' in sys.modules)"
    )
    assert _run(program) == "True"


@pytest.mark.parametrize(
    ("kernels", "dtype", "kv_cache_dtype"),
    [
        ("native", "bfloat16", "auto"),
        ("native", "float16", "int8"),
        ("reference", "float32", "auto"),
    ],
)
def test_it_computes_what_a_whole_torch_computes(
    kernels: str, dtype: str, kv_cache_dtype: str
) -> None:
    if kernels == "native" and native.library() is None:
        pytest.skip(f"no native kernels: {native.missing_reason()}")
    lean, whole = (_outputs(torch, kernels, dtype, kv_cache_dtype) for torch in ("lean", "whole"))
    assert len(lean.splitlines()) > 50
    assert lean == whole


def _outputs(*words: str) -> str:
    command = (sys.executable, str(Path(__file__).with_name("every_sampling.py")), *words)
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout
