"""From logits to tokens, a whole batch at once. Knows slots; knows no model and no blocks.

Order, as Hugging Face's processors: logit bias, penalties, min_tokens mask, temperature, top-k,
top-p, min-p, one draw. The draw takes one uniform number per token from a counter-based generator,
so a sequence's tokens depend on its seed and logits alone, never on what else is in the batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..step import StepResult, TokenLogprobs
from .slots import SlotTables

SIZES = (256, 8192, sys.maxsize)
"""Most cuts fall inside the best 256 tokens, which are found in one pass; of the rows where they do
not, more are looked at, and only where these are too few is a vocabulary sorted."""

FEW_LOGITS = 1 << 19
"""So many are one thread's work: torch's others, when they are done, stay awake for more of it on
the cores that the next step's kernels want, and cost these a third of their speed."""

BLOCK = 256
"""Of weights that are summed together, so that a draw adds up blocks and then one block only."""


Fetch = Callable[[Tensor], Callable[[], Tensor]]
"""Begins a copy to the host, gives what waits for it: `Staging.fetch`."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of those rows of a step that ask for them, natural logs of the model's own distribution."""

    rows: np.ndarray
    num_top: np.ndarray
    chosen: Tensor
    """[rows]; where logits were not finite there is no token, and no meaning."""
    top_ids: Tensor
    top: Tensor
    """[rows, most asked for], most likely first."""

    def fetch(self, begin: Fetch) -> Callable[[list[TokenLogprobs | None]], None]:
        """See Samples.fetch; the result puts them into the entries of their rows."""
        fetched = [begin(tensor) for tensor in (self.chosen, self.top_ids, self.top)]

        def put(into: list[TokenLogprobs | None]) -> None:
            columns = (tensor().tolist() for tensor in fetched)
            rows = zip(self.rows.tolist(), self.num_top.tolist(), *columns, strict=True)
            for row, k, chosen, ids, values in rows:
                into[row] = TokenLogprobs(chosen, ids[:k], values[:k])

        return put


@dataclass(frozen=True, slots=True)
class Samples:
    """Where they were computed."""

    token_ids: Tensor
    """[S] int, -1 where the logits were not finite."""
    logprobs: Logprobs | None

    def fetch(self, begin: Fetch) -> Callable[[], StepResult]:
        """Begins to copy all of it to the host; the result waits for that."""
        fetched = begin(self.token_ids)
        put_logprobs = self.logprobs.fetch(begin) if self.logprobs else None

        def result() -> StepResult:
            token_ids: list[int] = fetched().tolist()
            entries: list[TokenLogprobs | None] = [None] * len(token_ids)
            if put_logprobs:
                put_logprobs(entries)
            return StepResult(token_ids, entries)

        return result


class Sampler:
    """Samples for slots of `tables`."""

    def __init__(self, tables: SlotTables) -> None:
        self._tables = tables

    def sample(self, logits: Tensor, slots: np.ndarray, lengths: np.ndarray) -> Samples:
        """logits: [S, V] fp32, overwritten; slots: [S]; lengths: [S] tokens known so far."""
        with _threads_for(logits):
            return self._sample(logits, slots, lengths)

    def _sample(self, logits: Tensor, slots: np.ndarray, lengths: np.ndarray) -> Samples:
        tables = self._tables
        finite = torch.isfinite(logits.sum(-1))
        wants_logprobs = np.flatnonzero(tables.num_logprobs[slots] >= 0)
        adjusted = np.flatnonzero(tables.is_adjusted[slots])
        raw = _rows(logits, wants_logprobs)
        if raw is logits and len(adjusted):
            raw = raw.clone()
        for i in adjusted:
            self._adjust(logits[i], int(slots[i]), int(lengths[i]))
        token_ids = torch.where(finite, self._choose(logits, slots, lengths), -1)
        if len(wants_logprobs) == 0:
            return Samples(token_ids, None)
        return Samples(token_ids, self._logprobs(raw, wants_logprobs, slots, token_ids))

    def _choose(self, logits: Tensor, slots: np.ndarray, lengths: np.ndarray) -> Tensor:
        is_drawn = self._tables.temperature[slots] > 0.0
        drawn, greedy = np.flatnonzero(is_drawn), np.flatnonzero(~is_drawn)
        if len(drawn) == 0:
            return logits.argmax(-1)
        token_ids = torch.empty(len(slots), dtype=torch.int64, device=logits.device)
        tokens = self._draw(_rows(logits, drawn), slots[drawn], lengths[drawn])
        token_ids[moved(drawn, logits.device)] = tokens
        if len(greedy):
            token_ids[moved(greedy, logits.device)] = _rows(logits, greedy).argmax(-1)
        return token_ids

    # ---- logits that one request changes -----------------------------------------------------

    def _adjust(self, row: Tensor, slot: int, length: int) -> None:
        sampling, device = self._tables.sampling[slot], row.device
        if sampling.logit_bias:
            ids = moved(np.array(list(sampling.logit_bias)), device)
            row[ids] += moved(np.array(list(sampling.logit_bias.values())), device, row.dtype)
        num_prompt = int(self._tables.num_prompt_tokens[slot])
        known = moved(self._tables.token_ids[slot, :length], device, torch.int64)
        if sampling.repetition_penalty != 1.0:
            penalty = sampling.repetition_penalty
            punished = torch.where(row > 0, row / penalty, row * penalty)
            row.copy_(torch.where(_counts(known, row) > 0, punished, row))
        if sampling.presence_penalty or sampling.frequency_penalty:
            counts = _counts(known[num_prompt:], row)
            row -= sampling.presence_penalty * (counts > 0) + sampling.frequency_penalty * counts
        if length - num_prompt < sampling.min_tokens:
            stop_ids = np.array(self._tables.stop_ids[slot], dtype=np.int64)
            row.index_fill_(0, moved(stop_ids, device), -torch.inf)

    # ---- the draw ----------------------------------------------------------------------------

    def _draw(self, logits: Tensor, slots: np.ndarray, lengths: np.ndarray) -> Tensor:
        tables = self._tables
        logits = logits / _column(tables.temperature[slots], logits)
        uniform = _column(self._uniform(slots, lengths), logits, torch.float64)
        is_filtered = (
            (tables.top_k[slots] > 0) | (tables.top_p[slots] < 1.0) | (tables.min_p[slots] > 0.0)
        )
        device = logits.device
        token_ids = torch.empty(len(slots), dtype=torch.int64, device=device)
        free, cut = np.flatnonzero(~is_filtered), np.flatnonzero(is_filtered)
        if len(free):
            probabilities = torch.softmax(_rows(logits, free), -1)
            tokens = _inverse_cdf(probabilities, _rows(uniform, free))
            token_ids[moved(free, device)] = tokens
        if len(cut):
            # To look at more where few were too few, the host must know: on a device it never asks.
            sizes = SIZES if device.type == "cpu" else SIZES[-1:]
            tokens = self._draw_cut(_rows(logits, cut), _rows(uniform, cut), slots[cut], sizes)
            token_ids[moved(cut, device)] = tokens
        return token_ids

    def _uniform(self, slots: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """[S] in [0, 1): a hash of seed, sample and position in the output."""
        tables = self._tables
        position = (lengths - tables.num_prompt_tokens[slots]).astype(np.uint64)
        with np.errstate(over="ignore"):
            state = splitmix64(tables.seed[slots] ^ splitmix64(tables.sample_index[slots]))
            bits = splitmix64(state + position * np.uint64(0x9E3779B97F4A7C15))
        return (bits >> np.uint64(11)) * 2.0**-53

    def _draw_cut(
        self, logits: Tensor, uniform: Tensor, slots: np.ndarray, sizes: Sequence[int]
    ) -> Tensor:
        """Draws among the most likely tokens that pass top-k, top-p and min-p."""
        tables = self._tables
        num_candidates, *larger = (min(size, logits.shape[-1]) for size in sizes)
        best, ids = logits.topk(num_candidates, sorted=True)
        p = torch.exp((best - _log_total(logits)).double())
        top_k = _column(tables.top_k[slots], logits, torch.int64)
        rank = torch.arange(num_candidates, device=logits.device)
        kept = (top_k == 0) | (rank < top_k)
        mass = torch.where(top_k > 0, (p * kept).sum(-1, keepdim=True), 1.0)
        top_p = _column(tables.top_p[slots], logits, torch.float64) * mass
        # The token that crosses the threshold is kept, so the best token always is.
        kept &= (p.cumsum(-1) - p < top_p) | (rank == 0)
        kept &= p >= _column(tables.min_p[slots], logits, torch.float64) * p[:, :1]
        token_ids = ids.gather(-1, _inverse_cdf(p * kept, uniform)[:, None]).squeeze(-1)
        # A cut is decided when it fell before the last candidate and top-k's own mass is known.
        is_open = (kept[:, -1:] & (top_k != num_candidates)) | (top_k > num_candidates)
        if num_candidates == logits.shape[-1]:
            return token_ids
        undecided = np.flatnonzero(is_open[:, 0].cpu().numpy())
        if len(undecided):
            token_ids[undecided] = self._draw_cut(
                logits[undecided], uniform[undecided], slots[undecided], larger
            )
        return token_ids

    # ---- log probabilities -------------------------------------------------------------------

    def _logprobs(
        self, raw: Tensor, rows: np.ndarray, slots: np.ndarray, token_ids: Tensor
    ) -> Logprobs:
        """`raw`: the rows' logits before any change."""
        total = _log_total(raw)
        num_top = self._tables.num_logprobs[slots[rows]]
        best, best_ids = raw.topk(min(int(num_top.max()), raw.shape[-1]), sorted=True)
        chosen_ids = _rows(token_ids, rows).clamp(min=0)[:, None]
        chosen = (raw.gather(-1, chosen_ids) - total).squeeze(-1)
        return Logprobs(rows, num_top, chosen, best_ids, best - total)


@contextmanager
def _threads_for(logits: Tensor) -> Iterator[None]:
    num_threads = torch.get_num_threads()
    is_one = logits.device.type == "cpu" and logits.numel() <= FEW_LOGITS and num_threads > 1
    if is_one:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if is_one:
            torch.set_num_threads(num_threads)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Steele, Lea and Flood 2014: a bijective hash of 64 bits."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def _inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """weights: [S, N], not normalised; uniform: [S, 1] -> index [S], never one of zero weight.

    By blocks, then within one: a row's blocks and sums depend on nothing but the row.
    """
    num_rows, num_weights = weights.shape
    padded = functional.pad(weights, (0, -num_weights % BLOCK))
    blocks = padded.view(num_rows, -1, BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)
    block, rest = _crossing(sums, uniform * sums.sum(-1, keepdim=True))
    within = blocks[torch.arange(num_rows, device=weights.device), block].double()
    index = block * BLOCK + _crossing(within, rest)[0]
    # Only where nothing is finite does it lie in the padding.
    return index.clamp(max=num_weights - 1)


def _crossing(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first index [S] at which the sum of weights [S, N] is above target [S, 1], and what is
    left of the target there."""
    cumulative = weights.cumsum(-1)
    # Rounding can push the target to the very end: it stays below, so that what crosses it weighs.
    end = cumulative[:, -1:]
    target = torch.minimum(target, torch.nextafter(end, torch.zeros_like(end)))
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)
    rest = target - (cumulative - weights).gather(-1, index)
    return index.squeeze(-1), rest


def _counts(token_ids: Tensor, row: Tensor) -> Tensor:
    """How often each token of `row`'s vocabulary occurs. Of a fixed size: nothing waits for it."""
    counts = torch.zeros_like(row)
    return counts.scatter_add_(0, token_ids, torch.ones_like(token_ids, dtype=row.dtype))


def _log_total(logits: Tensor) -> Tensor:
    """[S, 1]. Of a row alone torch would sum parts in threads: other bits than beside others."""
    rows = logits.expand(2, -1) if len(logits) == 1 else logits
    return rows.logsumexp(-1, keepdim=True)[: len(logits)]


def _rows(logits: Tensor, rows: np.ndarray) -> Tensor:
    """Some rows; all of them without a copy."""
    return logits if len(rows) == len(logits) else logits[moved(rows, logits.device)]


def _column(values: np.ndarray, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return moved(values, like.device, dtype or like.dtype)[:, None]


def moved(values: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """On the device, without waiting for what that computes: from pageable memory torch would."""
    host = torch.from_numpy(values)
    host = host if dtype is None else host.to(dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
