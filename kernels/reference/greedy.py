"""greedy: the most likely token of each row. Knows no model and no sampling."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .case import Builder, Case, Cost, Inputs, num_bytes


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Return int32 [S]: where each row of logits [S, V] is largest, the first such place.

    -1 for a row that is not finite throughout: there is nothing to choose from.
    """
    finite = torch.isfinite(logits).all(-1)
    best = logits.amax(-1, keepdim=True) == logits
    places = torch.arange(logits.shape[-1], device=logits.device, dtype=torch.int32)
    first = torch.where(best, places, logits.shape[-1]).amin(-1)
    return torch.where(finite, first, -1).to(torch.int32)


def cost(logits: torch.Tensor) -> Cost:
    return Cost(num_bytes(logits), logits.numel())


def cases() -> Iterator[Case]:
    for num_rows in (1, 64):
        yield Case(f"vocabulary-32000-{num_rows}-rows", _plain(num_rows, 32000), is_timed=True)
    yield Case("odd-size", lambda inputs: (inputs.normal(3, 37),))
    yield Case("one-token", lambda inputs: (inputs.normal(2, 1),))
    yield Case("no-rows", lambda inputs: (inputs.normal(0, 64),))
    yield Case("ties", lambda inputs: (inputs.normal(5, 100, scale=0.0),))
    yield Case("largest-last", _largest_last)
    yield Case("not-finite", _not_finite)
    yield Case("strided-rows", lambda inputs: (inputs.normal(4, 200)[:, 8:168],))


def _plain(num_rows: int, size: int) -> Builder:
    return lambda inputs: (inputs.normal(num_rows, size),)


def _largest_last(inputs: Inputs) -> tuple[object, ...]:
    logits = inputs.normal(4, 67)
    logits[:, -1] = 50.0
    return (logits,)


def _not_finite(inputs: Inputs) -> tuple[object, ...]:
    logits = inputs.normal(6, 70)
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        logits[row, 13 * row] = value
        logits[row + 3, 69] = value
    return (logits,)
