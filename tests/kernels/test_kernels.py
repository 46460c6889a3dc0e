"""Every implementation of every operation, at every instruction set of this machine, on every case.

What is expected is the reference computed in fp32 from the same inputs. Knows no operation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from pilotlight.kernels import check, table
from pilotlight.kernels.cpu import native
from pilotlight.kernels.reference.case import Case

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(
    native.library() is None, reason=native.missing_reason() or "the library is there"
)


@dataclass(frozen=True)
class Trial:
    """One implementation at one level (None: it has none) on one case."""

    implementation: table.Implementation
    level: str | None
    case: Case
    dtype: torch.dtype

    def __str__(self) -> str:
        way = self.implementation.name + (f"@{self.level}" if self.level else "")
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.implementation.op}-{way}-{self.case.name}-{dtype}"


@cache
def cases_of(op: str) -> dict[str, Case]:
    return {case.name: case for case in table.Implementation(op, "reference").module().cases()}


def cases_at(op: str, is_best: bool, dtype: torch.dtype) -> list[Case]:
    """The shapes of real models are large: a few of them, in their own dtype, at the best level.

    `pilotlight.bench.kernels` checks all of them.
    """
    timed = [case for case in cases_of(op).values() if case.is_timed]
    small = [case for case in cases_of(op).values() if not case.is_timed]
    return small + (timed[::3] if is_best and dtype is torch.bfloat16 else [])


def trials() -> Iterator[Trial]:
    for op in table.TABLE:
        for implementation in table.implementations(op):
            levels = native.levels() if implementation.name == "cpu" else [None]
            for level in levels:
                is_best = level is not None and level == levels[0]
                for dtype in check.TOLERANCES:
                    for case in cases_at(op, is_best, dtype):
                        yield Trial(implementation, level, case, dtype)


@cache
def expected(op: str, case_name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    return check.expected(op, cases_of(op)[case_name], CPU, dtype)


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """One for torch: thousands of tiny comparisons spend their time waking others. Two for ours."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    native.set_num_threads(2)
    yield
    torch.set_num_threads(num_threads)
    native.set_num_threads(num_threads)


@pytest.fixture
def best_level() -> Iterator[None]:
    yield
    for level in native.levels()[:1]:
        native.force_level(level)


@pytest.mark.parametrize("trial", list(trials()), ids=str)
def test_agrees_with_the_reference(trial: Trial, best_level: None) -> None:
    arguments = trial.case.make(CPU, trial.dtype)
    if trial.level:
        native.force_level(trial.level)
    if not trial.implementation.accepts(*arguments):
        pytest.skip("does not take these arguments")
    wanted = expected(trial.implementation.op, trial.case.name, trial.dtype)
    actual = check.outcome(trial.implementation.function(), arguments)
    check.assert_close(actual, wanted, trial.dtype)
    assert actual[0].dtype == trial.dtype


@pytest.mark.parametrize("dtype", check.TOLERANCES, ids=str)
@pytest.mark.parametrize("op", table.TABLE)
def test_bound_kernels_take_every_case(op: str, dtype: torch.dtype) -> None:
    bound = getattr(table.bind(CPU, dtype), op)
    for case in cases_at(op, False, dtype):
        arguments = case.make(CPU, dtype)
        actual = check.outcome(bound, arguments)
        check.assert_close(actual, expected(op, case.name, dtype), dtype)


@needs_native
@pytest.mark.parametrize("op", table.TABLE)
def test_native_is_chosen_and_takes_the_shapes_of_real_models(op: str) -> None:
    assert table.bind(CPU, torch.bfloat16).choices[op] == "cpu"
    implementation = table.Implementation(op, "cpu")
    first = next(case for case in cases_of(op).values() if case.is_timed)
    assert implementation.accepts(*first.make(CPU, torch.bfloat16))


def test_other_dtypes_are_left_to_the_reference() -> None:
    assert set(table.bind(CPU, torch.float16).choices.values()) == {"reference"}


def test_unaccepted_arguments_fall_through_to_the_reference() -> None:
    kernels = table.bind(CPU, torch.float32)
    x, weight = torch.randn(64, 3).T, torch.randn(64)
    assert not table.Implementation("rms_norm", "cpu").accepts(x, weight, 1e-6)
    wanted = table.Implementation("rms_norm", "reference").function()(x, weight, 1e-6)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-6), wanted)
    with pytest.raises(RuntimeError):
        kernels.linear(torch.randn(2, 8), torch.randn(4, 9), None)


@needs_native
@pytest.mark.parametrize("is_own_pool", (False, True))
def test_results_do_not_depend_on_threads(is_own_pool: bool) -> None:
    linear = table.Implementation("linear", "cpu").function()
    x, weight, _ = cases_of("linear")["qwen2-0.5b-o-32-rows"].make(CPU, torch.bfloat16)
    outcomes = []
    for num_threads in (1, 2, 3):
        native.set_num_threads(num_threads)
        if is_own_pool and (library := native.library()):
            library.pilotlight_use_openmp(None)
        outcomes.append(linear(x, weight, None))
    native.set_num_threads(2)
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)


@needs_native
def test_indices_outside_their_tables_are_an_error() -> None:
    op = table.Implementation("rope_store_kv", "cpu")
    case = cases_of(op.op)["no-gqa"]
    *arguments, slots = case.make(CPU, torch.float32)
    assert isinstance(slots, torch.Tensor)
    slots[2] = 10**6
    with pytest.raises(IndexError, match="slot"):
        op.function()(*arguments, slots)


@needs_native
def test_blocks_outside_the_cache_are_an_error() -> None:
    op = table.Implementation("paged_attention", "cpu")
    case = cases_of(op.op)["one-token"]
    q, keys, values, tables, *lists = case.make(CPU, torch.float32)
    assert isinstance(tables, torch.Tensor)
    tables[0, 0] = 99
    with pytest.raises(IndexError, match="block"):
        op.function()(q, keys, values, tables, *lists)


@needs_native
def test_an_unknown_level_is_an_error(best_level: None) -> None:
    assert native.level() == native.levels()[0]
    assert native.levels()[-1] == "generic"
    with pytest.raises(ValueError, match=r"sse9.*generic"):
        native.force_level("sse9")
    assert native.level() == native.levels()[0]


def test_without_the_library_everything_binds_to_the_reference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = native.load(tmp_path / "libpilotlight_cpu.so")
    monkeypatch.setattr(native, "_loaded", lambda: missing)
    assert native.library() is None and native.level() is None and native.levels() == []
    assert "install g++" in (native.missing_reason() or "")
    kernels = table.bind(CPU, torch.float32)
    assert set(kernels.choices.values()) == {"reference"}
    assert kernels.silu_mul(torch.ones(2, 8)).shape == (2, 4)
    with pytest.raises(RuntimeError, match="install g"):
        native.force_level("generic")


def test_a_file_that_is_no_library_is_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "libpilotlight_cpu.so"
    path.write_bytes(b"not a library")
    assert "cannot be loaded" in str(native.load(path))


@needs_native
def test_another_interface_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    assert "another version" in str(native.load(native.LIBRARY_PATH))
