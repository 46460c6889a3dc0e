"""One implementation at one instruction set on one case: which there are, and whether one agrees.

    python -m pilotlight.tests.kernels.trials LIBRARY

tries every level of another build of the library, in a process of its own. Knows no operation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from pilotlight.kernels import check, table
from pilotlight.kernels.cpu import native
from pilotlight.kernels.reference.case import Case

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Trial:
    """`level` is None for an implementation that has none."""

    implementation: table.Implementation
    level: str | None
    case: Case
    dtype: torch.dtype

    def __str__(self) -> str:
        way = self.implementation.name + (f"@{self.level}" if self.level else "")
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.implementation.op}-{way}-{self.case.name}-{dtype}"

    def run(self) -> bool:
        """Raise AssertionError if it differs; False if it does not take the arguments."""
        arguments = self.case.make(CPU, self.dtype)
        if self.level:
            native.force_level(self.level)
        if not self.implementation.accepts(*arguments):
            return False
        wanted = expected(self.implementation.op, self.case.name, self.dtype)
        actual = check.outcome(self.implementation.function(), arguments)
        check.assert_close(actual, wanted, self.dtype)
        assert actual[0].dtype == (self.dtype if wanted[0].is_floating_point() else torch.int32)
        return True


def trials(is_quick: bool = False) -> Iterator[Trial]:
    for op in table.TABLE:
        for implementation in table.implementations(op):
            if table.DEVICES.get(implementation.name) == "cuda":  # see triton_trials.py
                continue
            levels = native.levels() if implementation.name == "cpu" else [None]
            for level in levels:
                is_best = level is not None and level == levels[0] and not is_quick
                for dtype in check.TOLERANCES:
                    for case in cases_at(op, is_best, dtype):
                        yield Trial(implementation, level, case, dtype)


def cases_at(op: str, is_best: bool, dtype: torch.dtype) -> list[Case]:
    """The shapes of real models are large: a few of them, in their own dtype, at the best level.

    `pilotlight.bench.kernels` checks all of them.
    """
    usable = [case for case in cases_of(op).values() if dtype in case.dtypes]
    timed = [case for case in usable if case.is_timed]
    small = [case for case in usable if not case.is_timed]
    return small + (timed[::3] if is_best and dtype is torch.bfloat16 else [])


@cache
def cases_of(op: str) -> dict[str, Case]:
    return {case.name: case for case in table.Implementation(op, "reference").module().cases()}


@cache
def expected(op: str, case_name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    return check.expected(op, cases_of(op)[case_name], CPU, dtype)


def main(library: str) -> int:
    native.LIBRARY_PATH = Path(library)
    if reason := native.missing_reason():
        print(reason, file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    native.set_num_threads(2)
    own = [trial for trial in trials(is_quick=True) if trial.level]
    for trial in own:
        try:
            trial.run()
        except AssertionError as error:
            print(f"{trial}: {error}", file=sys.stderr)
            return 1
    print(f"{len(own)} trials agree at {', '.join(native.levels())}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
