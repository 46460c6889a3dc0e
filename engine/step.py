"""Step and StepResult: all that policy (scheduler) and device (worker) share. Knows neither.

A running sequence owns one *slot* in [0, max_num_seqs) from admission until release or preemption.
The worker keeps, per slot, the tokens, the block table and the sampling state; a Step says what
changes and which rows to compute. Order inside a step: released, admitted, grown, drafted, then
rows.

A *draft* is a guess at a token that is not known yet. A row with drafts samples after its last
known token and after each draft; the scheduler keeps the tokens up to the first that the guess
missed. Nothing has to be undone for the others: what they left in tables and blocks is written
again before it is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .sampling_params import SamplingParams


@dataclass(slots=True)
class Admission:
    """A sequence takes `slot`. Everything the worker must know of it until it is released."""

    slot: int
    token_ids: list[int]
    """Prompt and, after a preemption, the tokens generated so far."""
    num_prompt_tokens: int
    sampling: SamplingParams
    sample_index: int
    """Which of the request's n samples: enters the random stream beside the seed."""
    min_tokens_stop_ids: tuple[int, ...]
    """Forbidden while fewer than sampling.min_tokens tokens were generated."""


@dataclass(slots=True)
class Growth:
    """`block_ids` continue the block table of `slot` at entry `first_index`."""

    slot: int
    first_index: int
    block_ids: list[int]


@dataclass(slots=True)
class Draft:
    """`token_ids` stand for the unknown tokens of `slot` from `first_position` on, in this step."""

    slot: int
    first_position: int
    token_ids: list[int]


@dataclass(slots=True)
class Row:
    """Compute `num_tokens` tokens of `slot` from position `start`, drafts included."""

    slot: int
    start: int
    num_tokens: int
    num_sampled: int
    """Of the last tokens, so many are sampled after: 0, 1, or, with drafts, all."""


@dataclass(slots=True)
class Step:
    """One batch: decodes (a known token, and drafts) first, then prefill chunks."""

    index: int
    released: list[int] = field(default_factory=list)
    admitted: list[Admission] = field(default_factory=list)
    grown: list[Growth] = field(default_factory=list)
    drafted: list[Draft] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(slots=True)
class TokenLogprobs:
    """Natural logs. `top` is ordered, most likely first; it need not hold the chosen token."""

    chosen: float
    top_ids: list[int]
    top: list[float]


@dataclass(slots=True)
class StepResult:
    """What came out, `num_sampled` entries per row, in the order of the rows and their tokens."""

    token_ids: list[int]
    """-1 where the logits were not finite: that sequence fails, the others go on."""
    logprobs: list[TokenLogprobs | None]
