"""Where the threads of the CPU kernels run: not where the one that waits for them does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from pilotlight.kernels.cpu import native

_PROGRAM = """
import os
from pilotlight.kernels.cpu import limits, native
import torch

def threads():
    return {int(name) for name in os.listdir("/proc/self/task")}

torch.set_num_threads(1)
native.set_num_threads(2)
memory = torch.ones(1 << 20)
before = threads()
limits.read_rate(memory)
(worker,) = threads() - before
allowed = os.sched_getaffinity(os.getpid())
for processor in sorted(allowed)[:2]:
    os.sched_setaffinity(os.getpid(), {processor})
    limits.read_rate(memory)
    assert os.sched_getaffinity(worker) == allowed - {processor}, (worker, processor)
"""


@pytest.mark.skipif(native.library() is None, reason="no compiled kernels here")
@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two processors",
)
def test_workers_keep_off_their_callers_processor() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
