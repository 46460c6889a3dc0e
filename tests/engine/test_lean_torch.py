"""torch imported without its compilers and trainers computes, and tells what it does not have."""

from __future__ import annotations

import subprocess
import sys

PREAMBLE = "from pilotlight.engine.lean_torch import LEFT_OUT, import_lean; import sys\n"


def _run(program: str) -> str:
    command = (sys.executable, "-c", PREAMBLE + program)
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_what_no_engine_needs_is_left_out() -> None:
    program = (
        "import_lean(); import torch\n"
        "x = torch.ones(2, 3, dtype=torch.bfloat16)\n"
        "print((x @ x.T).sum().item(), [name for name in LEFT_OUT if name in sys.modules])"
    )
    assert _run(program) == "12.0 []"


def test_no_stand_in_is_left_behind() -> None:
    program = (
        "import_lean(); from pilotlight.engine.lean_torch import StandIn\n"
        "modules = list(sys.modules.values())\n"
        "import torch\n"
        "print(any(isinstance(m, StandIn) for m in modules), hasattr(torch, 'optim'))"
    )
    assert _run(program) == "False False"


def test_a_whole_torch_stays_whole() -> None:
    program = "import torch; import_lean(); print('torch.optim' in sys.modules)"
    assert _run(program) == "True"


def test_a_version_that_was_not_tried_is_imported_whole() -> None:
    program = (
        "from pilotlight.engine import lean_torch\n"
        "lean_torch.LEAN_VERSIONS = ()\n"
        "import_lean(); print('torch.optim' in sys.modules)"
    )
    assert _run(program) == "True"
