"""Every implementation of every operation, at every instruction set of this machine, on every case.

What is expected is the reference computed in fp32 from the same inputs. Knows no operation.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pilotlight.kernels import cache_panels, check, table
from pilotlight.kernels.cpu import native
from pilotlight.tests.kernels.trials import CPU, Trial, cases_at, cases_of, expected, trials

needs_native = pytest.mark.skipif(
    native.library() is None, reason=native.missing_reason() or "the library is there"
)


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
    if not trial.run():
        pytest.skip("does not take these arguments")


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
@pytest.mark.parametrize(
    ("op", "case"),
    (
        ("linear", "qwen2-0.5b-o-32-rows"),
        ("packed_linear", "qwen2-0.5b-down-32-rows"),
        ("packed_linear", "qwen2-0.5b-down-32-rows-int12"),
        ("packed_gate_up", "many-rows-of-many"),
        ("packed_gate_up", "many-rows-of-many-int12"),
        ("paged_attention", "chunked-prefill-with-decodes"),
        ("paged_attention_int8", "chunked-prefill-with-decodes"),
        ("paged_attention_int16", "chunked-prefill-with-decodes"),
    ),
)
def test_results_do_not_depend_on_threads(op: str, case: str) -> None:
    function = table.Implementation(op, "cpu").function()
    arguments = cases_of(op)[case].make(CPU, torch.bfloat16)
    outcomes = []
    for num_threads in (1, 2, 3):
        native.set_num_threads(num_threads)
        outcomes.append(function(*arguments))
    native.set_num_threads(2)
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)


@pytest.mark.parametrize(
    ("case", "dtype"),
    (
        ("many-rows-of-many", torch.float32),
        ("many-rows-of-many", torch.bfloat16),
        ("many-rows-of-many-int12", torch.bfloat16),
    ),
)
@pytest.mark.parametrize("level", native.levels())
def test_a_packed_rows_result_does_not_depend_on_the_others(
    level: str, case: str, dtype: torch.dtype, best_level: None
) -> None:
    native.force_level(level)
    linear = table.Implementation("packed_linear", "cpu").function()
    x, weight, bias, num_outputs = cases_of("packed_linear")[case].make(CPU, dtype)
    assert isinstance(x, torch.Tensor)
    together = linear(x, weight, bias, num_outputs)
    for num_rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 24, 25, 31, 33, 48, 49, 65, 96, 97, 149):
        some = slice(150 - num_rows, 150)
        assert torch.equal(linear(x[some], weight, bias, num_outputs), together[some]), num_rows


@pytest.mark.parametrize(
    ("op", "dtype"),
    (
        ("paged_attention", torch.float32),
        ("paged_attention", torch.bfloat16),
        ("paged_attention_int8", torch.float32),
        ("paged_attention_int8", torch.bfloat16),
        ("paged_attention_int16", torch.bfloat16),
    ),
)
@pytest.mark.parametrize("level", native.levels())
def test_a_sequences_attention_does_not_depend_on_the_others(
    level: str, op: str, dtype: torch.dtype, best_level: None
) -> None:
    native.force_level(level)
    attention = table.Implementation(op, "cpu").function()
    case = cases_of(op)["chunked-prefill-with-decodes"]
    q, *caches, tables, starts, contexts, scale, window = case.make(CPU, dtype)
    assert isinstance(q, torch.Tensor) and isinstance(tables, torch.Tensor)
    assert isinstance(starts, torch.Tensor) and isinstance(contexts, torch.Tensor)
    together = attention(q, *caches, tables, starts, contexts, scale, window)
    for r, (begin, end) in enumerate(pairwise(starts.tolist())):
        own = tables[r : r + 1], starts[r : r + 2] - begin, contexts[r : r + 1]
        alone = attention(q[begin:end], *caches, *own, scale, window)
        assert torch.equal(alone, together[begin:end])


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


@pytest.mark.parametrize("dtype", check.TOLERANCES, ids=str)
@pytest.mark.parametrize("level", native.levels())
def test_a_later_key_leaves_no_trace(level: str, dtype: torch.dtype, best_level: None) -> None:
    native.force_level(level)
    attention = table.Implementation("paged_attention", "cpu").function()
    arguments = cases_of("paged_attention")["rows-of-several-tiles"].make(CPU, dtype)
    _, _, v_cache, tables, starts, *_ = arguments
    assert isinstance(v_cache, torch.Tensor) and isinstance(tables, torch.Tensor)
    assert isinstance(starts, torch.Tensor)
    last = int(starts[1]) - 1
    before = attention(*arguments)[:last]
    block_size = v_cache.shape[1]
    v_cache[tables[0, last // block_size], last % block_size] = 3e38
    assert torch.equal(attention(*arguments)[:last], before)


@pytest.mark.parametrize("level", native.levels())
def test_nor_does_one_in_panels(level: str, best_level: None) -> None:
    native.force_level(level)
    attention = table.Implementation("paged_attention_int16", "cpu").function()
    arguments = cases_of("paged_attention_int16")["rows-of-several-tiles"].make(CPU, torch.bfloat16)
    *_, k_scales, v_scales, tables, starts, _, _, _ = arguments
    assert isinstance(k_scales, torch.Tensor) and isinstance(v_scales, torch.Tensor)
    assert isinstance(tables, torch.Tensor) and isinstance(starts, torch.Tensor)
    last = int(starts[1]) - 1
    before = attention(*arguments)[:last]
    k_scales[tables[0, last // 16], 0, :, last % 16] = 1e30
    v_scales[tables[0, last // 16], 0, :, last % 16] = 1e34
    assert torch.equal(attention(*arguments)[:last], before)
    # Behind the end of what is cached, too, whatever is left of others.
    v_scales[tables[0, last // 16], 0, :, last % 16 + 1 :] = torch.nan
    assert torch.equal(attention(*arguments)[:last], before)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("op", ("rope_store_kv_int8", "rope_store_kv_int16"))
@pytest.mark.parametrize("name", ("cpu", "reference"))
def test_a_head_that_is_not_finite_shows_in_its_scale(name: str, op: str, value: float) -> None:
    if name == "cpu" and native.library() is None:
        pytest.skip("no native library")
    function = table.Implementation(op, name).function()
    q, k, v, *others = cases_of(op)["no-gqa"].make(CPU, torch.bfloat16)
    assert isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)
    k[0, 1, 2] = v[0, 2, 3] = value
    function(q, k, v, *others)
    *_, k_scales, v_scales, slots = others
    if op.endswith("int16"):
        k_scales, v_scales = cache_panels.scales_of(k_scales), cache_panels.scales_of(v_scales)
    assert k_scales.reshape(-1, 4)[slots[0]].isnan().tolist() == [False, True, False, False]
    assert v_scales.reshape(-1, 4)[slots[0]].isnan().tolist() == [False, False, True, False]


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
