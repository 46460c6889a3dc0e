"""Layouts of weights: what the native library packs is what the definition in torch says.

test_kernels.py multiplies what is packed here. One operation is known: its sums are bounded by how
rows and weights become integers.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pilotlight.engine import target
from pilotlight.engine.config import EngineConfig
from pilotlight.kernels import layouts, table
from pilotlight.kernels.cpu import native
from pilotlight.kernels.layout_names import (
    BLOCK,
    INTEGER_BITS,
    PAIRED,
    PANEL16,
    PANEL16_INT12,
    stored_shape,
)
from torch import Tensor

needs_native = pytest.mark.skipif(
    native.library() is None, reason=native.missing_reason() or "the library is there"
)
SIZES = ((1, 1), (5, 37), (16, 128), (33, 129), (48, 1001), (131, 256))
LARGEST_SUM = 1 << 20
"""What the magnitudes of a row's integers add up to in a block: kLargestSum."""


def weights(num_outputs: int, num_inputs: int) -> Tensor:
    """Of very different sizes, some of them nothing at all."""
    generator = torch.Generator().manual_seed(num_outputs * num_inputs)
    values = torch.randn(num_outputs, num_inputs, generator=generator)
    values[:, ::7] *= 1e-3
    values[num_outputs // 2] *= 1e-37
    values[num_outputs // 3, : num_inputs // 2] = 0
    return values.bfloat16()


@pytest.fixture(params=native.levels())
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def best_level() -> object:
    yield
    for name in native.levels()[:1]:
        native.force_level(name)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("layout", (PANEL16, PANEL16_INT12))
def test_the_library_packs_as_torch_does(level: str, layout: str, sizes: tuple[int, int]) -> None:
    native.force_level(level)
    weight = weights(*sizes)
    packed = layouts.pack(weight, layout)
    assert packed.shape == stored_shape(layout, *sizes, weight.element_size())
    assert torch.equal(packed, layouts.packed_by_torch(weight, layout))


@pytest.mark.parametrize("layout", (PANEL16, PANEL16_INT12))
def test_pairs_too(level: str, layout: str) -> None:
    native.force_level(level)
    first, second = weights(48, 300), weights(48, 300) * 2
    packed = layouts.pack_paired(first, second, layout)
    num_panels, *panel = stored_shape(layout + PAIRED, 48, 300, first.element_size())
    assert packed.shape == (2 * num_panels, *panel)
    both = layouts.interleaved(first, second)
    assert torch.equal(packed, layouts.packed_by_torch(both, layout))
    unpacked = layouts.unpack(packed, 96, 300)
    exact = layouts.unpack(layouts.pack(first, layout), 48, 300)
    assert torch.equal(layouts.separated(unpacked)[0], exact)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_integers_are_exact_but_for_the_smallest_of_a_block(sizes: tuple[int, int]) -> None:
    weight = weights(*sizes)
    found = layouts.unpack(layouts.pack(weight, PANEL16_INT12), *sizes).float()
    blocks, exact = (_blocks(w) for w in (found, weight.float()))
    largest = exact.abs().amax(-1, keepdim=True)
    error = (blocks - exact).abs()
    # Nothing is too small for the smallest exponent but what is near fp32's own end.
    assert (error <= largest * 2**-INTEGER_BITS + 2.0**-126).all()
    assert (error[(exact.abs() >= largest / 8) & (largest > 1e-30)] == 0).all()


def _blocks(weight: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK))
    return padded.view(len(weight), -1, BLOCK)


def test_what_is_not_finite_is_no_number_and_stays_in_its_block(level: str) -> None:
    native.force_level(level)
    weight = weights(20, 300)
    weight[3, 200], weight[7, 0] = torch.inf, torch.nan
    packed = layouts.pack(weight, PANEL16_INT12)
    assert torch.equal(packed, layouts.packed_by_torch(weight, PANEL16_INT12))
    lost = layouts.unpack(packed, 20, 300).isnan()
    assert lost[3, 128:256].all() and lost[7, :128].all()
    assert lost.sum() == 2 * BLOCK


@needs_native
@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=2 * BLOCK),
    power=st.integers(-100, 100),
    is_aligned=st.booleans(),
)
@example(sizes=[1.0] * 2 * BLOCK, power=0, is_aligned=True)
@example(sizes=[-1.0, 1.0] * BLOCK, power=100, is_aligned=True)
@example(sizes=[1.0] * 9, power=-100, is_aligned=False)
def test_the_sum_of_a_block_never_overflows(
    sizes: list[float], power: int, is_aligned: bool
) -> None:
    """Whatever a row holds, against the largest weights there are, of the row's own signs."""
    x = torch.ldexp(torch.tensor([sizes]), torch.tensor(power)).bfloat16()
    signs = torch.where(x < 0, -1.0, 1.0) if is_aligned else torch.ones_like(x)
    weight = (signs * 255 / 256).bfloat16().expand(16, -1).contiguous()
    wanted = x.double() @ weight.double().T
    # Of each value a half of what an integer stands for; what is nearly too small for a float is
    # nothing; the result is bfloat16.
    integer = x.double().abs().max() / 32767 + x.double().abs().sum() / LARGEST_SUM
    slack = 0.51 * len(sizes) * integer + 1e-30 + wanted.abs() * 2**-8
    multiply = table.Implementation("packed_linear", "cpu").function()
    for name in native.levels():
        native.force_level(name)
        found = multiply(x, layouts.pack(weight, PANEL16_INT12), None, 16).double()
        assert ((found - wanted).abs() <= slack).all(), name


@pytest.mark.parametrize(
    ("name", "dtype", "layout"),
    (
        ("avx2", "bfloat16", PANEL16_INT12),
        ("avx2", "float32", PANEL16),
        ("avx512", "bfloat16", PANEL16),
        ("amx", "bfloat16", PANEL16),
        ("generic", "bfloat16", "plain"),
        (None, "float32", "plain"),
    ),
)
def test_a_machine_gets_the_layout_that_it_multiplies_fastest(
    monkeypatch: pytest.MonkeyPatch, name: str | None, dtype: str, layout: str
) -> None:
    monkeypatch.setattr(native, "level", lambda: name)
    settings = EngineConfig(model="a", device="cpu", dtype=dtype)
    assert target.choose_target(settings, dtype).layout == layout
