"""Runs a Step: inputs, network, sampling. Knows no scheduler, request or process."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.decoder import Decoder, LayerCache
from ..step import Step, StepResult
from .decodes import RecordedDecodes
from .graphs import GraphBackend, GraphedDecodes
from .inputs import InputBuffers, StepInputs
from .sampler import Sampler
from .slots import SlotTables
from .staging import Staging


class Runner:
    """Owns the device state of all slots; one step of at most `max_num_drafts` drafts at a time.

    With `graphs`, the caches' last block is padding's: no sequence may have it.
    """

    def __init__(
        self,
        model: Decoder,
        caches: list[LayerCache],
        *,
        context_len: int,
        block_size: int,
        max_num_seqs: int,
        max_batched_tokens: int,
        max_num_drafts: int,
        staging: Staging,
        graphs: GraphBackend | None = None,
    ) -> None:
        self._model = model
        self._caches = caches
        self._tables = SlotTables(max_num_seqs, context_len, block_size)
        max_num_rows = max_num_seqs + max_num_drafts
        self._inputs = InputBuffers(
            self._tables,
            max_batched_tokens,
            max_num_rows,
            block_size,
            staging,
            padding_block=caches[0].k.shape[0] - 1,
        )
        self._decodes = self._decodes_of(graphs, min(max_num_rows, max_batched_tokens))
        self._sampler = Sampler(self._tables)

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        """Takes the step's changes, computes its rows and samples where asked."""
        self._decodes.capture_next()
        self._tables.apply(step)
        inputs = self._inputs.fill(step, self._decodes.num_padded)
        logits, best = (t[: len(inputs.slots)] for t in self._decodes.run(inputs))
        if len(inputs.slots) == 0:
            return StepResult([], [])
        if self._tables.takes_best[inputs.slots].all():
            result = StepResult(best.tolist(), [None] * len(best))
        else:
            result = self._sampler.sample(logits.float(), inputs.slots, inputs.lengths)
        self._tables.token_ids[inputs.slots, inputs.lengths] = result.token_ids
        return result

    def _decodes_of(
        self, graphs: GraphBackend | None, max_num_rows: int
    ) -> RecordedDecodes[tuple[Tensor, Tensor]] | GraphedDecodes:
        if graphs is None:
            return RecordedDecodes(self._computed, self._model.pulse)
        decodes = GraphedDecodes(
            self._computed, self._inputs.blank, graphs, max_num_rows, self._model.pulse
        )
        decodes.capture_first()
        return decodes

    def _computed(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Logits, and their most likely tokens."""
        hidden = self._model.forward(inputs.token_ids, inputs.batch, self._caches)
        logits = self._model.logits(hidden if inputs.is_decode else hidden[inputs.sampled])
        return logits, self._model.greedy(logits)
