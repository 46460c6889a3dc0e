"""Tokens that need more than a draw from the logits as they are: changed logits, log probabilities.

The draw itself is an operation of the step (`sample` in kernels/reference). Knows slots; knows no
model and no blocks. Order, as of the processors of Hugging Face: logit bias, penalties, min_tokens
mask, and then what `sample` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..step import StepResult, TokenLogprobs
from .slots import SlotTables

FEW_LOGITS = 1 << 19
"""So many are one thread's work: torch's others, when they are done, stay awake for more of it on
the cores that the next step's kernels want, and cost these a third of their speed."""

BANNED = torch.finfo(torch.float32).min
"""The logit of a token that must not come: finite, as `sample` wants them, and of no weight."""


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


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step has of the rows that are sampled after: all that most of them ask for."""

    logits: Tensor
    """[S, V], of any dtype; they stay as they are."""
    token_ids: Tensor
    """[S] int32."""
    draws: Tensor
    """[S, DRAW_WORDS]: what `sample` was told."""


class Sampler:
    """For slots of `tables`; `sample` is the operation."""

    def __init__(self, tables: SlotTables, sample: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._tables = tables
        self._sample = sample

    def finish(self, drawn: Drawn, slots: np.ndarray, lengths: np.ndarray) -> Samples:
        """slots: [S]; lengths: [S] tokens known so far. What is on a device waits for no host."""
        with _threads_for(drawn.logits):
            token_ids = self._redrawn(drawn, slots, lengths)
            return Samples(token_ids, self._logprobs(drawn.logits, token_ids, slots))

    def _redrawn(self, drawn: Drawn, slots: np.ndarray, lengths: np.ndarray) -> Tensor:
        """The tokens, those of changed logits drawn again."""
        adjusted = np.flatnonzero(self._tables.is_adjusted[slots])
        if len(adjusted) == 0:
            return drawn.token_ids
        rows = moved(adjusted, drawn.logits.device)
        logits = drawn.logits[rows].float()
        for i, row in enumerate(adjusted):
            self._adjust(logits[i], int(slots[row]), int(lengths[row]))
        return drawn.token_ids.index_copy(0, rows, self._sample(logits, drawn.draws[rows]))

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
            row.index_fill_(0, moved(stop_ids, device), BANNED)

    # ---- log probabilities -------------------------------------------------------------------

    def _logprobs(self, logits: Tensor, token_ids: Tensor, slots: np.ndarray) -> Logprobs | None:
        num_logprobs = self._tables.num_logprobs[slots]
        asking = np.flatnonzero(num_logprobs >= 0)
        if len(asking) == 0:
            return None
        num_top = num_logprobs[asking]
        rows = moved(asking, logits.device)
        raw = logits[rows].float()
        total = _log_total(raw)
        best, best_ids = _most_likely(raw, min(int(num_top.max()), raw.shape[-1]))
        chosen_ids = token_ids[rows].long().clamp(min=0)[:, None]
        chosen = (raw.gather(-1, chosen_ids) - total).squeeze(-1)
        return Logprobs(asking, num_top, chosen, best_ids, best - total)


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


def _counts(token_ids: Tensor, row: Tensor) -> Tensor:
    """How often each token of `row`'s vocabulary occurs. Of a fixed size: nothing waits for it."""
    counts = torch.zeros_like(row)
    return counts.scatter_add_(0, token_ids, torch.ones_like(token_ids, dtype=row.dtype))


def _most_likely(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[S, k] the logits, fp32, and their tokens; of equal ones the first, however many are wanted.

    `topk` alone takes any of them, and others for another k: what other rows ask for would show.
    """
    size = logits.shape[-1]
    bits = logits.view(torch.int32)
    places = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # in the order of the floats
    backwards = torch.arange(size - 1, -1, -1, device=logits.device)
    best = ((places << 32) | backwards).topk(k, sorted=True).values
    ids = size - 1 - (best & 0xFFFFFFFF)
    return logits.gather(-1, ids), ids


def _log_total(logits: Tensor) -> Tensor:
    """[S, 1]. Of a row alone torch would sum parts in threads: other bits than beside others."""
    rows = logits.expand(2, -1) if len(logits) == 1 else logits
    return rows.logsumexp(-1, keepdim=True)[: len(logits)]


def moved(values: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """On the device, without waiting for what that computes: from pageable memory torch would."""
    host = torch.from_numpy(values)
    host = host if dtype is None else host.to(dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
