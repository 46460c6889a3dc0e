"""Triton's operations on every small case, in its interpreter, against the reference.

    TRITON_INTERPRET=1 python -m pilotlight.tests.kernels.triton_trials

In a process of its own: Triton looks at the variable when it is imported. bfloat16 is left out: the
interpreter's products of it are wrong.
"""

from __future__ import annotations

import sys
import warnings

import torch
from pilotlight.kernels import check, table
from pilotlight.kernels.triton import paged_attention
from pilotlight.tests.kernels.trials import CPU, cases_of

TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3)}
SLOW = "paged_attention"
"""Half a minute for all of its cases: in fp16 every fourth."""


def run(op: str, dtype: torch.dtype) -> int:
    """The number of cases. Raises AssertionError where one differs."""
    implementation = table.Implementation(op, "triton")
    cases = [case for case in cases_of(op).values() if not case.is_timed]
    if op == SLOW and dtype is torch.float16:
        cases = cases[::4]
    for case in cases:
        arguments = case.make(CPU, dtype)
        assert implementation.accepts(*arguments), f"{op}: {case.name} is not taken"
        wanted = check.expected(op, case, CPU, dtype)
        actual = check.outcome(implementation.function(), arguments)
        for a, w in zip(actual, wanted, strict=True):
            relative, absolute = TOLERANCES[dtype] if a.is_floating_point() else (0.0, 0.0)
            torch.testing.assert_close(
                a, w.to(a.dtype), rtol=relative, atol=absolute, equal_nan=True, msg=None
            )
    return len(cases)


def split_contexts() -> None:
    """Contexts in pieces, some of which a short sequence does not reach."""
    paged_attention.MIN_SPLIT_KEYS = 16
    names = [n for n, case in cases_of(SLOW).items() if not case.is_timed and "decode" in n]
    assert names, "there are cases of decodes"
    for name in names:
        arguments = cases_of(SLOW)[name].make(CPU, torch.float32)
        wanted = check.expected(SLOW, cases_of(SLOW)[name], CPU, torch.float32)
        actual = check.outcome(paged_attention.paged_attention, arguments)
        check.assert_close(actual, wanted, torch.float32)
    print(f"{SLOW}, split: {len(names)} cases")


def main() -> int:
    # Padded places compute what is never stored.
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    torch.set_num_threads(1)
    for op, names in table.TABLE.items():
        if "triton" in names:
            for dtype in TOLERANCES:
                print(f"{op}, {dtype}: {run(op, dtype)} cases", flush=True)
    split_contexts()
    return 0


if __name__ == "__main__":
    sys.exit(main())
