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
ATTENTION = "paged_attention"
SLOW = (ATTENTION, "sample")
"""Half a minute for all of their cases: in fp16, and over int8, every fourth."""

FP8_CASES = {"rope_store_kv": ("no-gqa",), ATTENTION: ("decode-across-blocks", "sliding-window-7")}


def run(op: str, folder: str, dtype: torch.dtype) -> int:
    """The number of cases. Raises AssertionError where one differs."""
    implementation = table.Implementation(op, folder)
    cases = [case for case in cases_of(op).values() if not case.is_timed]
    is_first = op in SLOW and folder == "triton" and dtype is torch.float32
    if op.startswith(SLOW) and not is_first:
        cases = cases[::4]
    for case in cases:
        arguments = case.make(CPU, dtype)
        assert implementation.accepts(*arguments), f"{op}: {case.name} is not taken"
        wanted = check.expected(op, case, CPU, dtype)
        actual = check.outcome(implementation.function(), arguments)
        for a, w in zip(actual, wanted, strict=True):
            exact = check.INTEGER_TOLERANCE if a.dtype is torch.int8 else (0.0, 0.0)
            relative, absolute = TOLERANCES[dtype] if a.is_floating_point() else exact
            torch.testing.assert_close(
                a, w.to(a.dtype), rtol=relative, atol=absolute, equal_nan=True, msg=None
            )
    return len(cases)


def split_contexts() -> None:
    """Contexts in pieces, some of which a short sequence does not reach."""
    paged_attention.MIN_SPLIT_KEYS = 16
    names = [n for n, case in cases_of(ATTENTION).items() if not case.is_timed and "decode" in n]
    assert names, "there are cases of decodes"
    for name in names:
        arguments = cases_of(ATTENTION)[name].make(CPU, torch.float32)
        wanted = check.expected(ATTENTION, cases_of(ATTENTION)[name], CPU, torch.float32)
        actual = check.outcome(paged_attention.paged_attention, arguments)
        check.assert_close(actual, wanted, torch.float32)
    print(f"{ATTENTION}, split: {len(names)} cases")


def fp8_caches() -> None:
    """Stored and attended to in float8_e4m3fn, as the reference does; numbers beyond its range."""
    for op in ("rope_store_kv", ATTENTION):
        for dtype in TOLERANCES:
            for name in FP8_CASES[op]:
                arguments, expected = (_with_fp8(op, name, dtype) for _ in range(2))
                wanted = check.outcome(table.Implementation(op, "reference").function(), expected)
                function = table.Implementation(op, "triton").function()
                for a, w in zip(check.outcome(function, arguments), wanted, strict=True):
                    # Ties are broken otherwise, and where rounding carries into the exponent, which
                    # gives a power of two, the interpreter loses it.
                    relative, absolute = (2**-3, 2**-9) if a.itemsize == 1 else (2e-3, 2e-3)
                    is_judged = (w.float().frexp()[0].abs() != 0.5) | (a.itemsize > 1)
                    a, w = a.float()[is_judged], w.float()[is_judged]
                    torch.testing.assert_close(a, w, rtol=relative, atol=absolute)
    print("fp8 caches")


def _with_fp8(op: str, name: str, dtype: torch.dtype) -> tuple[object, ...]:
    arguments = list(cases_of(op)[name].make(CPU, dtype))
    places = (5, 6) if op == "rope_store_kv" else (1, 2)
    for place in places:
        arguments[place] = arguments[place].to(torch.float8_e4m3fn)
    if op == "rope_store_kv":
        arguments[2][0] *= 1000.0
    return tuple(arguments)


def main() -> int:
    # Padded places compute what is never stored.
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    torch.set_num_threads(1)
    for op, names in table.TABLE.items():
        for folder in ("triton", "invariant"):
            for dtype in TOLERANCES if folder in names else ():
                print(f"{op}, {folder}, {dtype}: {run(op, folder, dtype)} cases", flush=True)
    split_contexts()
    fp8_caches()
    return 0


if __name__ == "__main__":
    sys.exit(main())
