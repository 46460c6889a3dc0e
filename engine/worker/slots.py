"""What the worker keeps per slot: tokens, block table, sampling. Changed by Steps only.

Plain numpy tables of fixed size, so that a step gathers its inputs without a loop over tokens.
"""

from __future__ import annotations

import numpy as np

from ...kernels.draws import DRAW
from ..sampling_params import SamplingParams
from ..step import Admission, Draft, Growth, Step
from .uniforms import uniforms

NO_SAMPLING = SamplingParams()
MAX_TOP_K = 2**31 - 1
"""More than there are tokens: as good as any larger number."""


class SlotTables:
    """`num_slots` sequences of at most `context_len` tokens in blocks of `block_size`."""

    def __init__(self, num_slots: int, context_len: int, block_size: int) -> None:
        max_blocks = -(-context_len // block_size)
        # One column more than the context: the last token sampled is never computed.
        self.token_ids = np.zeros((num_slots, context_len + 1), dtype=np.int32)
        self.block_ids = np.zeros((num_slots, max_blocks), dtype=np.int32)
        self.num_prompt_tokens = np.zeros(num_slots, dtype=np.int64)
        self.sample_index = np.zeros(num_slots, dtype=np.uint64)
        self.seed = np.zeros(num_slots, dtype=np.uint64)
        self.draws = np.zeros(num_slots, dtype=DRAW)
        """All but the number that decides, which changes from token to token."""
        self.is_adjusted = np.zeros(num_slots, dtype=bool)
        """Needs its logits changed: bias, penalties or min_tokens."""
        self.num_logprobs = np.full(num_slots, -1, dtype=np.int64)
        self.is_plain = np.zeros(num_slots, dtype=bool)
        """Takes what is drawn from the logits as they are, and asks for nothing else."""
        self.num_awaited = np.zeros(num_slots, dtype=np.int8)
        """Tokens that steps in flight sample: the newest is on the device, not in `token_ids`."""
        self.reads_tokens = np.zeros(num_slots, dtype=bool)
        """Sampling looks at the tokens so far."""
        self.sampling = [NO_SAMPLING] * num_slots
        self.stop_ids: list[tuple[int, ...]] = [()] * num_slots

    def apply(self, step: Step) -> None:
        """Released slots need no change here: nothing refers to them until they are admitted."""
        for admission in step.admitted:
            self._admit(admission)
        for growth in step.grown:
            self._grow(growth)
        for draft in step.drafted:
            self._write(draft)

    def _admit(self, admission: Admission) -> None:
        slot, sampling = admission.slot, admission.sampling
        self.token_ids[slot, : len(admission.token_ids)] = admission.token_ids
        self.num_awaited[slot] = 0
        self.num_prompt_tokens[slot] = admission.num_prompt_tokens
        self.sample_index[slot] = admission.sample_index
        self.seed[slot] = sampling.seed
        cuts = min(sampling.top_k, MAX_TOP_K), sampling.top_p, sampling.min_p
        self.draws[slot] = (sampling.temperature, *cuts, 0.0)
        self.num_logprobs[slot] = sampling.num_logprobs
        self.sampling[slot] = sampling
        self.stop_ids[slot] = admission.min_tokens_stop_ids
        self.is_adjusted[slot] = (
            sampling.has_penalties or bool(sampling.logit_bias) or sampling.min_tokens > 0
        )
        self.reads_tokens[slot] = sampling.has_penalties
        self.is_plain[slot] = not self.is_adjusted[slot] and sampling.num_logprobs < 0

    def draws_at(self, slots: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """[S] of DRAW, for the tokens behind `lengths` tokens of those slots."""
        draws: np.ndarray = self.draws[slots]
        if draws["temperature"].any():
            draws["uniform"] = self.uniforms_at(slots, lengths)
        return draws

    def uniforms_at(self, slots: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        positions = lengths - self.num_prompt_tokens[slots]
        return uniforms(self.seed[slots], self.sample_index[slots], positions)

    def await_tokens(self, slots: np.ndarray) -> None:
        self.num_awaited[slots] += 1

    def end_waiting(self, slots: np.ndarray) -> None:
        self.num_awaited[slots] -= 1

    def _grow(self, growth: Growth) -> None:
        end = growth.first_index + len(growth.block_ids)
        self.block_ids[growth.slot, growth.first_index : end] = growth.block_ids

    def _write(self, draft: Draft) -> None:
        end = draft.first_position + len(draft.token_ids)
        self.token_ids[draft.slot, draft.first_position : end] = draft.token_ids
