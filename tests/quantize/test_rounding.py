"""One matrix to integers: grids, exactness, and what calibration is for."""

from __future__ import annotations

import pytest
import torch
from pilotlight.engine.models.quantization import Scheme
from pilotlight.quantize.rounding import calibrated, grid_of, round_to_nearest


def _scheme(bits: int = 4, group: int = 32, sym: bool = True, order: bool = False) -> Scheme:
    return Scheme(bits, group, sym, order, True)


def _weight(rows: int = 24, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))


def _hessian(columns: int = 96) -> torch.Tensor:
    """Of inputs that go together and matter differently, as a model's do."""
    source = torch.Generator().manual_seed(3)
    mixed = torch.randn(columns, columns, generator=source) * torch.logspace(0, -2, columns)
    x = torch.randn(400, columns, generator=source) @ mixed
    return x.T @ x


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", [0, 32, 64, 40])
def test_rounding_is_at_most_half_a_step_off(bits: int, sym: bool, group: int) -> None:
    weight, scheme = _weight(), _scheme(bits, group, sym)
    found = round_to_nearest(weight, scheme)
    assert found.q.min() >= 0 and found.q.max() <= 2**bits - 1
    assert torch.equal(found.scales, found.scales.half().float())
    steps = (found.floats() - weight).abs() / found.scales[:, found.g_idx]
    # The largest value of a symmetric grid lies half a step outside; fp16 scales add a little.
    assert steps.max() <= (1.01 if sym else 0.6) + 2**bits * 1e-3


def test_weights_of_zeros_stay_zeros() -> None:
    found = round_to_nearest(torch.zeros(8, 64), _scheme(sym=False))
    assert torch.equal(found.floats(), torch.zeros(8, 64))


def test_a_grid_holds_zero() -> None:
    scale, zero = grid_of(torch.tensor([[2.0, 3.0]]), _scheme(sym=False))
    assert zero.item() == 0 and scale.item() == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_calibration_changes_outputs_less_than_rounding(sym: bool, order: bool, group: int) -> None:
    weight, hessian = _weight(), _hessian()
    scheme = _scheme(4, group, sym, order and group > 0)

    def error(floats: torch.Tensor) -> float:
        change = floats - weight
        return float(((change @ hessian) * change).sum())

    found = calibrated(weight, hessian, scheme)
    assert error(found.floats()) < 0.6 * error(round_to_nearest(weight, scheme).floats())
    assert torch.equal(found.g_idx.bincount(), round_to_nearest(weight, scheme).g_idx.bincount())


def test_inputs_that_were_never_seen_become_zeros() -> None:
    hessian = _hessian()
    hessian[5], hessian[:, 5] = 0.0, 0.0
    found = calibrated(_weight(), hessian, _scheme())
    assert torch.isfinite(found.floats()).all()
    assert found.floats()[:, 5].abs().max() < 1e-6
