"""How flash kernels are asked, with modules that do what is documented of these arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from pilotlight.kernels import check, table
from pilotlight.kernels.flash import paged_attention as flash
from pilotlight.kernels.flash.versions import VERSIONS
from pilotlight.kernels.probe import Probe
from pilotlight.kernels.pytorch import paged_attention as in_pytorch
from pilotlight.kernels.reference.paged_attention import Batch
from pilotlight.tests.kernels.trials import CPU, cases_of, expected
from torch import Tensor

CUDA = torch.device("cuda")
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


def version_4(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    seqused_k: Tensor, page_table: Tensor, softmax_scale: float, causal: bool,
    window_size: tuple[int | None, int | None], num_splits: int,
) -> tuple[Tensor, None]:  # fmt: skip
    assert causal and num_splits in ((0,) if max_seqlen_q == 1 else (1,))
    starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    assert max(lengths, default=0) <= max_seqlen_k
    left, right = window_size
    window = (-1, -1) if left is None or right is None else (left, right)
    out = attend(q, k, v, page_table, starts, lengths, max_seqlen_q, softmax_scale, window)
    return out, None


VERSION_3, VERSION_4, VERSION_2 = (version.module for version in VERSIONS)
FAKES = {
    VERSION_2: {"flash_attn_varlen_func": version_2},
    VERSION_3: {"flash_attn_with_kvcache": version_3},
    VERSION_4: {"flash_attn_varlen_func": version_4},
}


def forget() -> None:
    for found in (flash.installed, flash.card, flash._chosen):
        found.cache_clear()


@pytest.fixture(autouse=True)
def looked_for_anew() -> Iterator[None]:
    forget()
    yield
    forget()


def install(monkeypatch: pytest.MonkeyPatch, name: str, major: int) -> None:
    """A package, on a card of that compute capability."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(FAKES[name])
    if "." in name:
        package = ModuleType(name.partition(".")[0])
        package.__spec__ = ModuleSpec(package.__name__, None, is_package=True)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, name, module)
    forget()
    put_card(monkeypatch, major)


def put_card(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))


@pytest.mark.parametrize(("version", "major"), [(VERSION_3, 9), (VERSION_4, 10)])
@pytest.mark.parametrize("name", SMALL)
def test_it_is_asked_for_what_the_reference_computes(
    name: str, version: str, major: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, version, major)
    arguments = CASES[name].make(CPU, torch.bfloat16)
    if not flash.accepts(*arguments):
        pytest.skip("does not take these arguments")
    actual = check.outcome(flash.paged_attention, arguments)
    wanted = expected("paged_attention", name, torch.bfloat16)
    check.assert_close(actual, wanted, torch.bfloat16)


@pytest.mark.parametrize("window", [0, 9])
def test_version_2_takes_large_blocks_only(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, VERSION_2, 8)
    assert not flash.accepts(*CASES["decode-across-blocks"].make(CPU, torch.bfloat16))
    assert_agrees_on_large_blocks(flash, window)


def assert_agrees_on_large_blocks(module: ModuleType, window: int) -> None:
    for sequences in ([(1, 300), (30, 600), (1, 7)], [(1, 300), (1, 7)]):
        batch = Batch(sequences, block_size=256, sliding_window=window, num_padded=2)
        case = type(CASES[SMALL[0]])("large blocks", batch)
        arguments = case.make(CPU, torch.bfloat16)
        assert module.accepts(*arguments)
        wanted = check.expected("paged_attention", case, CPU, torch.bfloat16)
        actual = check.outcome(module.paged_attention, arguments)
        check.assert_close(actual, wanted, torch.bfloat16)


def test_it_is_for_devices_and_packages_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not flash.supported(CUDA, torch.bfloat16), "flash-attn is not installed here"
    install(monkeypatch, VERSION_3, 9)
    assert flash.supported(CUDA, torch.bfloat16)
    assert not flash.supported(CUDA, torch.float32)
    assert not flash.supported(CPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("version", "major", "block_size", "prompts", "decodes"),
    [
        (VERSION_3, 9, 16, True, True),
        (VERSION_3, 10, 16, False, False),
        (VERSION_4, 9, 16, True, False),
        (VERSION_4, 10, 16, True, True),
        (VERSION_2, 9, 16, False, False),
        (VERSION_2, 9, 512, True, True),
    ],
)
def test_each_version_suits_its_cards_and_phases(
    version: str,
    major: int,
    block_size: int,
    prompts: bool,
    decodes: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, version, major)
    suits = [flash.suits(CUDA, is_decode, block_size) for is_decode in (False, True)]
    assert suits == [prompts, decodes]


def test_phases_are_served_by_whoever_suits_each(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    install(monkeypatch, VERSION_4, 9)
    kernels = table.bind(CUDA, torch.bfloat16)
    assert kernels.choices["paged_attention"] == "flash (prompts), triton (decodes)"
    assert kernels.choices["paged_attention_int8"] == "triton"
    assert not kernels.on_reference & {"paged_attention", "paged_attention_int8"}
    wanted = table.Attention(prompts="triton")
    assert table.bind(CUDA, torch.bfloat16, attention=wanted).choices["paged_attention"] == "triton"
    with pytest.raises(ValueError, match="flash cannot be used here for decodes in blocks of 16"):
        table.bind(CUDA, torch.bfloat16, attention=table.Attention("flash"))


def test_a_step_of_one_token_each_is_one_of_decodes() -> None:
    asked = []
    named = {phase: fake(phase, asked) for phase in ("prompts", "decodes")}
    bound = table._by_phase([named["prompts"]], [named["decodes"]])
    for sequences in ([(1, 5), (1, 9)], [(2, 5), (1, 9)]):
        bound(*type(CASES[SMALL[0]])("any", Batch(sequences)).make(CPU, torch.float32))
    assert asked == ["decodes", "prompts"]


def fake(phase: str, asked: list[str]) -> table.Implementation:
    class Fake(table.Implementation):
        def function(self) -> Callable[..., object]:
            return lambda *args: asked.append(phase)

    return Fake("paged_attention", phase)


@pytest.fixture
def torch_flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operation of torch, by its own schema, with something behind it on a CPU."""
    put_card(monkeypatch, 8)
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", in_torch, "CPU")
    yield
    library._destroy()


def in_torch(
    q: Tensor, k: Tensor, v: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None,
    seqused_k: Tensor | None = None, alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None, num_splits: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert is_causal and not dropout_p and not return_debug_mask
    assert scale is not None and seqused_k is not None
    window = (-1, -1) if window_size_left is None else (window_size_left, window_size_right or 0)
    if block_table is None:  # each sequence's keys, side by side, are one block
        assert (cum_seq_k.diff() == max_k).all()
        k, v = (x.unflatten(0, (-1, max_k)) for x in (k, v))
        block_table = torch.arange(len(k), dtype=torch.int32)[:, None]
    lengths = seqused_k.tolist()
    assert max(lengths) <= max_k
    out = attend(q, k, v, block_table, cum_seq_q.tolist(), lengths, max_q, scale, window)
    return out, *(torch.empty(0) for _ in range(4))


@pytest.mark.usefixtures("torch_flash")
@pytest.mark.parametrize("name", SMALL)
def test_prompts_are_laid_side_by_side_for_the_kernels_in_torch(name: str) -> None:
    arguments = CASES[name].make(CPU, torch.bfloat16)
    if not in_pytorch.accepts(*arguments):
        pytest.skip("does not take these arguments")
    actual = check.outcome(in_pytorch.paged_attention, arguments)
    wanted = expected("paged_attention", name, torch.bfloat16)
    check.assert_close(actual, wanted, torch.bfloat16)


@pytest.mark.usefixtures("torch_flash")
@pytest.mark.parametrize("window", [0, 9])
def test_the_kernels_in_torch_read_large_blocks_where_they_are(window: int) -> None:
    if not in_pytorch.takes_blocks():
        pytest.skip("this torch cannot be told of blocks")
    assert_agrees_on_large_blocks(in_pytorch, window)


@pytest.mark.usefixtures("torch_flash")
@pytest.mark.parametrize("block_size", [16, 256])
def test_what_others_wrote_is_asked_before_it_is_used(
    block_size: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = table.Implementation("paged_attention", "pytorch")
    ours = table.Implementation("paged_attention", "reference")
    for dtype in (torch.float16, torch.bfloat16):
        probe = Probe(CPU, dtype, block_size)
        assert [probe(theirs, is_decode) for is_decode in (False, True)] == [True, True]
    monkeypatch.setattr(in_pytorch, "without_padding", lambda out, start: out.flatten(1) + 0.1)
    assert not probe(theirs, False)
    assert "attention of prompts is not pytorch's: AssertionError" in caplog.text
    assert probe(ours, False)


def test_the_next_takes_the_place_of_one_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    install(monkeypatch, VERSION_3, 9)
    asked = []

    def is_right(implementation: table.Implementation, is_decode: bool) -> bool:
        asked.append((implementation.name, is_decode))
        return implementation.name != "flash" or is_decode

    kernels = table.bind(CUDA, torch.bfloat16, is_right=is_right)
    assert kernels.choices["paged_attention"] == "triton (prompts), flash (decodes)"
    assert ("reference", False) not in asked, "nobody needs to know"


@pytest.mark.usefixtures("torch_flash")
def test_little_is_laid_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    make = type(CASES[SMALL[0]])("any", Batch([(1, 300), (30, 300)])).make
    assert in_pytorch.accepts(*make(CPU, torch.bfloat16))
    monkeypatch.setattr(in_pytorch, "MAX_GATHERED_TOKENS", 500)
    assert not in_pytorch.accepts(*make(CPU, torch.bfloat16))
    assert not in_pytorch.suits(CPU, True, 16), "decodes are not"


def test_what_depends_on_other_rows_is_not_taken_where_nothing_may() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    wanted = table.Attention("triton")
    assert table.bind(CUDA, torch.bfloat16, attention=wanted).choices["linear"] == "reference"
    invariant = table.bind(CUDA, torch.bfloat16, is_invariant=True).choices
    assert {invariant[op] for op in ("linear", "paged_attention", "quantized_linear")} == {
        table.INVARIANT
    }
    with pytest.raises(ValueError, match="only invariant"):
        table.bind(CUDA, torch.bfloat16, is_invariant=True, attention=wanted)


def test_attention_is_chosen_by_name() -> None:
    choices = table.bind(CPU, torch.bfloat16, attention=table.Attention("reference")).choices
    assert choices["paged_attention"] == choices["paged_attention_int8"] == "reference"
    assert choices["rms_norm"] == table.bind(CPU, torch.bfloat16).choices["rms_norm"]
    with pytest.raises(ValueError, match=r"flash cannot be used here.* what can: .*reference"):
        table.bind(CPU, torch.bfloat16, attention=table.Attention("flash"))
