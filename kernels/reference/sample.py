"""sample: a token of each row, drawn as its parameters say. Knows no requests and no seeds.

The order is that of Hugging Face's processors: temperature, top-k, top-p, min-p, one draw.

A token's weight is 2^40 e^((x - max) / temperature), rounded to an integer. Sums of integers are
the same in any order: in parts, on several threads, on another device.

Each cut is a least logit. What is as likely as the last token that a cut keeps is kept as well, so
that no order among equals is needed, and tokens are drawn in the order of their ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from ..draws import DRAW, DRAW_WORDS
from .case import Builder, Case, Cost, Inputs, num_bytes

ONE = 2.0**40
"""The weight of the most likely token."""


def sample(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return int32 [S]: a token for each row of logits [S, V]; draws: int32 [S, DRAW_WORDS].

    At temperature 0 the first place where a row is largest. -1 for a row that is not finite
    throughout: there is nothing to choose from.
    """
    finite = torch.isfinite(logits).all(-1)
    x = logits.float()
    temperature = _floats(draws, "temperature")
    token_ids = torch.where(temperature > 0, _drawn(x, draws, temperature), _first_largest(x))
    return torch.where(finite, token_ids, -1).to(torch.int32)


def _first_largest(x: torch.Tensor) -> torch.Tensor:
    places = torch.arange(x.shape[-1], device=x.device)
    return torch.where(x == x.amax(-1, keepdim=True), places, x.shape[-1]).amin(-1)


def _drawn(x: torch.Tensor, draws: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    scale = torch.where(temperature > 0, math.log2(math.e) / temperature, 0.0)[:, None]
    shares = torch.exp2((x - x.amax(-1, keepdim=True)) * scale)
    weights = (shares * ONE).round().long()
    kept = (x >= _least_kept(x, weights, draws)) & (shares >= _floats(draws, "min_p")[:, None])
    cumulative = torch.where(kept, weights, 0).cumsum(-1)
    total = cumulative[:, -1:]
    target = (_uniform(draws) * total.double()).long().minimum(total - 1)
    index = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # Only where a row is not finite does it lie beyond.
    return index.clamp(max=x.shape[-1] - 1)


def _least_kept(x: torch.Tensor, weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """[S, 1]: the least logit that top-k, and top-p of what that kept, keep."""
    ordered, order = x.sort(-1, descending=True)
    top_k = draws[:, 1:2].long()
    last = torch.where(top_k > 0, top_k.clamp(max=x.shape[-1]), x.shape[-1]) - 1
    is_in_k = ordered >= ordered.gather(-1, last)
    cumulative = (weights.gather(-1, order) * is_in_k).cumsum(-1)
    wanted = _floats(draws, "top_p").double()[:, None] * cumulative[:, -1:].double()
    reached = (cumulative.double() >= wanted).int().argmax(-1, keepdim=True)
    return ordered.gather(-1, reached)


def _floats(draws: torch.Tensor, name: str) -> torch.Tensor:
    """[S] fp32."""
    column = (DRAW.names or ()).index(name)  # each of those before `uniform` is one word
    return draws[:, column].contiguous().view(torch.float32)


def _uniform(draws: torch.Tensor) -> torch.Tensor:
    """[S, 1] fp64."""
    return draws[:, -2:].contiguous().view(torch.float64)


def cost(logits: torch.Tensor, draws: torch.Tensor) -> Cost:
    return Cost(num_bytes(logits, draws), logits.numel())


# ---- cases -----------------------------------------------------------------------------------

Kind = tuple[float, int, float, float]
"""temperature, top_k, top_p, min_p."""

GREEDY: Kind = (0.0, 0, 1.0, 0.0)
FREE: Kind = (1.0, 0, 1.0, 0.0)
KINDS: dict[str, Kind] = {
    "greedy": GREEDY,
    "greedy-whatever-else": (0.0, 3, 0.5, 0.5),
    "free": FREE,
    "hot": (1.7, 0, 1.0, 0.0),
    "nearly-greedy": (1e-3, 0, 1.0, 0.0),
    "top-1": (1.0, 1, 1.0, 0.0),
    "top-k": (0.8, 20, 1.0, 0.0),
    "top-k-of-all": (1.0, 10_000_000, 1.0, 0.0),
    "top-p": (1.0, 0, 0.9, 0.0),
    "top-p-of-one": (1.0, 0, 1e-7, 0.0),
    "nearly-all": (1.0, 0, 1.0 - 2**-24, 0.0),
    "min-p": (1.0, 0, 1.0, 0.2),
    "all-cuts": (1.3, 50, 0.9, 0.05),
}


def cases() -> Iterator[Case]:
    for name in ("greedy", "free", "top-p", "all-cuts"):
        for num_rows, size in ((1, 32_000), (64, 32_000), (1, 151_936)):
            build = _rows(num_rows, size, [KINDS[name]], scale=2.5)
            yield Case(f"{name}-{num_rows}-rows-of-{size}", build, is_timed=True)
    for name, kind in KINDS.items():
        yield Case(name, _rows(8, 700, [kind]))
        yield Case(f"{name}-of-equals", _rows(3, 100, [kind], scale=0.0))
    mixed = list(KINDS.values())
    yield Case("mixed", _rows(2 * len(mixed), 900, mixed))
    yield Case("peaked", _rows(len(mixed), 3000, mixed, scale=30.0))
    yield Case("nearly-flat", _rows(len(mixed), 3000, mixed, scale=0.01))
    yield Case("odd-size", _rows(len(mixed), 37, mixed))
    yield Case("one-token", _rows(len(mixed), 1, mixed))
    yield Case("no-rows", _rows(0, 64, mixed))
    yield Case("largest-last", _largest_last)
    yield Case("not-finite", _not_finite)
    yield Case("masked", _masked)
    yield Case("strided-rows", _strided)
    yield Case("least-and-most-uniform", _at_the_ends)


def _rows(num_rows: int, size: int, kinds: list[Kind], scale: float = 1.5) -> Builder:
    def build(inputs: Inputs) -> tuple[object, ...]:
        return inputs.normal(num_rows, size, scale=scale), draws_of(inputs, num_rows, kinds)

    return build


def draws_of(
    inputs: Inputs, num_rows: int, kinds: list[Kind], uniform: float | None = None
) -> torch.Tensor:
    """Of each kind in turn; with other uniform numbers in each row, or with the same."""
    draws = np.zeros(num_rows, dtype=DRAW)
    for i in range(num_rows):
        draws[i] = (*kinds[i % len(kinds)], 0.0)
    numbers = inputs.integers(1 << 30, num_rows).cpu().numpy() / 2.0**30
    draws["uniform"] = numbers if uniform is None else uniform
    words = torch.from_numpy(draws.view(np.int32).reshape(num_rows, DRAW_WORDS))
    return words.to(inputs.device)


def _largest_last(inputs: Inputs) -> tuple[object, ...]:
    logits = inputs.normal(4, 67)
    logits[:, -1] = 50.0
    return logits, draws_of(inputs, 4, [GREEDY, FREE])


def _not_finite(inputs: Inputs) -> tuple[object, ...]:
    logits = inputs.normal(12, 70)
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        for kind in range(2):
            logits[row + 6 * kind, 13 * row] = value
            logits[row + 3 + 6 * kind, 69] = value
    return logits, draws_of(inputs, 12, [GREEDY, FREE, KINDS["all-cuts"]])


def _masked(inputs: Inputs) -> tuple[object, ...]:
    """Tokens that must not be drawn have the least finite logit."""
    logits = inputs.normal(len(KINDS), 200)
    logits[:, ::2] = torch.finfo(torch.bfloat16).min
    return logits, draws_of(inputs, len(KINDS), list(KINDS.values()))


def _strided(inputs: Inputs) -> tuple[object, ...]:
    kinds = list(KINDS.values())
    return inputs.normal(len(kinds), 200)[:, 8:168], draws_of(inputs, len(kinds), kinds)


def _at_the_ends(inputs: Inputs) -> tuple[object, ...]:
    kinds = list(KINDS.values())
    logits = inputs.normal(2 * len(kinds), 300)
    ends = [draws_of(inputs, len(kinds), kinds, uniform) for uniform in (0.0, 1.0 - 2.0**-53)]
    return logits, torch.cat(ends)
