"""How flash-attn is asked, with modules that do what its documentation says of these arguments."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from pilotlight.kernels import check, table
from pilotlight.kernels.flash import paged_attention as flash
from pilotlight.kernels.reference.paged_attention import Batch
from pilotlight.tests.kernels.trials import CPU, cases_of, expected
from torch import Tensor

CASES = cases_of("paged_attention")
SMALL = [name for name, case in CASES.items() if not case.is_timed]


def attend(
    q: Tensor, k: Tensor, v: Tensor, tables: Tensor, starts: list[int], lengths: list[int],
    longest: int, scale: float, window: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Bottom-right causal, sequence by sequence; what no sequence has is left as it was."""
    out = torch.full_like(q, torch.nan)
    for r, length in enumerate(lengths):
        rows = range(starts[r], starts[r + 1])
        assert len(rows) <= longest
        if not rows:
            continue
        blocks = tables[r, : -(-length // k.shape[1])].long()
        keys, values = (cache[blocks].flatten(0, 1)[:length] for cache in (k, v))
        group = q.shape[1] // k.shape[2]
        keys, values = (x.repeat_interleave(group, 1).float() for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[rows.start : rows.stop].float(), keys) * scale
        position = torch.arange(length - len(rows), length)[:, None]
        key = torch.arange(length)[None]
        hidden = key > position + max(window[1], 0)
        if window[0] >= 0:
            hidden = hidden | (key < position - window[0])
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[rows.start : rows.stop] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out


def version_3(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, page_table: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, softmax_scale: float, causal: bool,
    window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    assert causal
    starts, lengths = cu_seqlens_q.tolist(), cache_seqlens.tolist()
    return attend(
        q, k_cache, v_cache, page_table, starts, lengths, max_seqlen_q, softmax_scale, window_size
    )


def version_2(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, *, softmax_scale: float, causal: bool,
    window_size: tuple[int, int], block_table: Tensor,
) -> Tensor:  # fmt: skip
    assert causal
    assert k.shape[1] % 256 == 0, "pages of version 2"
    lengths = cu_seqlens_k.diff().tolist()
    assert max(lengths, default=0) <= max_seqlen_k
    starts = cu_seqlens_q.tolist()
    return attend(q, k, v, block_table, starts, lengths, max_seqlen_q, softmax_scale, window_size)


@pytest.fixture(autouse=True)
def looked_for_anew() -> Iterator[None]:
    flash.installed.cache_clear()
    yield
    flash.installed.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: object) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    flash.installed.cache_clear()


@pytest.mark.parametrize("name", SMALL)
def test_version_3_is_asked_for_what_the_reference_computes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, flash.VERSION_3, flash_attn_with_kvcache=version_3)
    arguments = CASES[name].make(CPU, torch.bfloat16)
    if not flash.accepts(*arguments):
        pytest.skip("does not take these arguments")
    actual = check.outcome(flash.paged_attention, arguments)
    wanted = expected("paged_attention", name, torch.bfloat16)
    check.assert_close(actual, wanted, torch.bfloat16)


@pytest.mark.parametrize("window", [0, 9])
def test_version_2_takes_large_blocks_only(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, flash.VERSION_2, flash_attn_varlen_func=version_2)
    assert not flash.accepts(*CASES["decode-across-blocks"].make(CPU, torch.bfloat16))
    sequences = [(1, 300), (30, 600), (1, 7)]
    batch = Batch(sequences, block_size=256, sliding_window=window, num_padded=2)
    case = type(CASES[SMALL[0]])("large blocks", batch)
    arguments = case.make(CPU, torch.bfloat16)
    assert flash.accepts(*arguments)
    wanted = check.expected("paged_attention", case, CPU, torch.bfloat16)
    actual = check.outcome(flash.paged_attention, arguments)
    check.assert_close(actual, wanted, torch.bfloat16)


def test_it_is_for_devices_and_packages_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert not flash.supported(cuda, torch.bfloat16), "flash-attn is not installed here"
    install(monkeypatch, flash.VERSION_3, flash_attn_with_kvcache=version_3)
    assert flash.supported(cuda, torch.bfloat16)
    assert not flash.supported(cuda, torch.float32)
    assert not flash.supported(CPU, torch.bfloat16)


def test_what_depends_on_other_rows_is_not_taken_where_nothing_may() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    cuda = torch.device("cuda")
    assert table.bind(cuda, torch.bfloat16, attention="triton").choices["linear"] == "reference"
    invariant = table.bind(cuda, torch.bfloat16, is_invariant=True).choices
    assert {invariant[op] for op in ("linear", "paged_attention", "quantized_linear")} == {
        table.INVARIANT
    }
    with pytest.raises(ValueError, match="only invariant"):
        table.bind(cuda, torch.bfloat16, is_invariant=True, attention="triton")


def test_attention_is_chosen_by_name() -> None:
    choices = table.bind(CPU, torch.bfloat16, attention="reference").choices
    assert choices["paged_attention"] == choices["paged_attention_int8"] == "reference"
    assert choices["rms_norm"] == table.bind(CPU, torch.bfloat16).choices["rms_norm"]
    with pytest.raises(ValueError, match=r"flash cannot be used here; what can: .*reference"):
        table.bind(CPU, torch.bfloat16, attention="flash")
