"""A sampler over slot tables that tests fill directly, without scheduler or model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pilotlight.engine.sampling_params import SamplingParams
from pilotlight.engine.step import Admission, Step, StepResult
from pilotlight.engine.worker.sampler import Drawn, Sampler
from pilotlight.engine.worker.slots import SlotTables
from pilotlight.kernels import table
from pilotlight.kernels.draws import DRAW_WORDS
from torch import Tensor

CONTEXT_LEN = 64


def normal_logits(num_rows: int, vocab_size: int, seed: int = 0, spread: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(num_rows, vocab_size, generator=generator)


class SlotBench:
    """One thread: waiting for each other over such small rows costs minutes on a busy machine."""

    def __init__(self, num_slots: int) -> None:
        torch.set_num_threads(1)
        self._tables = SlotTables(num_slots, CONTEXT_LEN, 16)
        self._drawn_from: list[Tensor] = []
        self._operation = table.bind(torch.device("cpu"), torch.float32).sample
        self._sampler = Sampler(self._tables, self._sample)
        self._lengths = np.zeros(num_slots, dtype=np.int32)

    def admit(
        self,
        slot: int,
        sampling: SamplingParams,
        prompt_ids: Sequence[int] = (1, 2, 3),
        output_ids: Sequence[int] = (),
        sample_index: int = 0,
        stop_ids: tuple[int, ...] = (),
    ) -> None:
        """A sequence that has its prompt and the given output so far."""
        token_ids = [*prompt_ids, *output_ids]
        admission = Admission(slot, token_ids, len(prompt_ids), sampling, sample_index, stop_ids)
        self._tables.apply(Step(0, admitted=[admission]))
        self._lengths[slot] = len(token_ids)

    def sample(self, logits: Tensor, slots: Sequence[int] | None = None) -> StepResult:
        """Row i belongs to slots[i], or to slot i."""
        rows, lengths = self._rows(logits, slots)
        words = self._tables.draws_at(rows, lengths).view(np.int32).reshape(-1, DRAW_WORDS)
        draws = torch.from_numpy(words)
        drawn = Drawn(logits, self._sample(logits, draws), draws)
        samples = self._sampler.finish(drawn, rows, lengths)
        return samples.fetch(lambda computed: lambda: computed)()

    def adjusted(self, logits: Tensor) -> Tensor:
        """The logits that are drawn from after bias, penalties and mask."""
        before = logits.clone()
        self.sample(logits)
        assert logits.equal(before), "what others may still read was changed"
        result, is_adjusted = logits.clone(), self._tables.is_adjusted[: len(logits)]
        if is_adjusted.any():
            result[torch.from_numpy(is_adjusted)] = self._drawn_from[-1]
        return result

    def _sample(self, logits: Tensor, draws: Tensor) -> Tensor:
        self._drawn_from.append(logits)
        return self._operation(logits, draws)

    def _rows(self, logits: Tensor, slots: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
        rows = np.arange(len(logits)) if slots is None else np.array(slots)
        return rows.astype(np.int32), self._lengths[rows]
