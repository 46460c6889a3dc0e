"""torch imported without its compilers computes, and becomes whole when asked."""

from __future__ import annotations

import subprocess
import sys

PREAMBLE = "from pilotlight.engine.lean_torch import import_rest, import_torch; import sys\n"


def _run(program: str) -> str:
    command = (sys.executable, "-c", PREAMBLE + program)
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_what_only_compilers_need_is_left_out() -> None:
    program = (
        "import_torch(); import torch\n"
        "x = torch.ones(2, 3, dtype=torch.bfloat16)\n"
        "print((x @ x.T).sum().item(), 'torch._meta_registrations' in sys.modules,"
        " 'torch._decomp.decompositions' in sys.modules)"
    )
    assert _run(program) == "12.0 False False"


def test_the_rest_comes_when_asked_for() -> None:
    program = (
        "import_torch(); import_rest(); import torch\n"
        "x = torch.empty(2, 3, device='meta') @ torch.empty(3, 4, device='meta')\n"
        "print(list(x.shape), callable(torch.export.export))"
    )
    assert _run(program) == "[2, 4] True"


def test_a_whole_torch_stays_whole() -> None:
    program = "import torch; import_torch(); print('torch._meta_registrations' in sys.modules)"
    assert _run(program) == "True"
