"""Runs Steps: inputs, network, sampling. Knows no scheduler, request or process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..models.decoder import Decoder, LayerCache
from ..step import Step, StepResult
from .graphs import GraphBackend, GraphedDecodes
from .inputs import InputBuffers, StepInputs
from .recorded import RecordedSteps
from .sampler import Drawn, Sampler, Samples
from .slots import SlotTables
from .staging import Staging


class Started:
    """A step that was started: its tokens are on their way to the host."""

    def __init__(
        self,
        tables: SlotTables,
        inputs: StepInputs,
        fetched: Callable[[], StepResult],
        is_awaited: bool,
    ) -> None:
        self._tables = tables
        self._is_awaited = is_awaited
        """Another step may start before this one lands, and computes its tokens unseen."""
        self._slots, self._lengths = inputs.slots, inputs.lengths
        self._fetched = fetched
        self._result: StepResult | None = None

    def land(self) -> StepResult:
        """Waits for the step, and for nothing that was started after it."""
        if self._result is None:
            self._result = self._fetched()
            self._tables.token_ids[self._slots, self._lengths] = self._result.token_ids
            if self._is_awaited:
                self._tables.end_waiting(self._slots)
        return self._result


class Runner:
    """Owns the device state of all slots; one step of at most `max_num_drafts` drafts at a time.

    With `graphs`, the caches' last block is padding's: no sequence may have it. Only if it
    `runs_ahead` may a step be started before the one before it has landed.
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
        runs_ahead: bool = False,
    ) -> None:
        self._model = model
        self._caches = caches
        self._staging = staging
        self._runs_ahead = runs_ahead
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
        self._sampler = Sampler(self._tables, model.sample)
        self._last: Started | None = None

    @torch.inference_mode()
    def start(self, step: Step) -> Started:
        """Takes the step's changes, begins to compute its rows and to sample where asked."""
        self._decodes.capture_next()
        self._tables.apply(step)
        inputs = self._inputs.fill(step, self._decodes.num_padded)
        samples = self._sampled(inputs)
        if self._runs_ahead:
            self._inputs.keep_newest(inputs, samples.token_ids)
            self._tables.await_tokens(inputs.slots)
        # Without a step ahead nothing overwrites them before they are read.
        fetch = self._staging.fetch if self._runs_ahead else _as_it_is
        self._last = Started(self._tables, inputs, samples.fetch(fetch), self._runs_ahead)
        return self._last

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Computes the largest step there may be, over padding: nothing is stored."""
        self._computed(self._inputs.largest())

    def _sampled(self, inputs: StepInputs) -> Samples:
        logits, token_ids = self._decodes.run(inputs)
        num_sampled = len(inputs.slots)
        draws = inputs.draws
        if len(token_ids) > num_sampled:  # filled up
            logits, token_ids, draws = (t[:num_sampled] for t in (logits, token_ids, draws))
        if inputs.is_plain:
            return Samples(token_ids, None)
        if self._last is not None and self._tables.reads_tokens[inputs.slots].any():
            self._last.land()
        drawn = Drawn(logits, token_ids, draws)
        return self._sampler.finish(drawn, inputs.slots, inputs.lengths)

    def _decodes_of(
        self, graphs: GraphBackend | None, max_num_rows: int
    ) -> RecordedSteps | GraphedDecodes:
        if graphs is None:
            return RecordedSteps(self._computed, self._model.pulse)
        decodes = GraphedDecodes(
            self._computed, self._inputs.blank, graphs, max_num_rows, self._model.pulse
        )
        decodes.capture_first()
        return decodes

    def _computed(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Logits, and the tokens drawn from them."""
        hidden = self._model.forward(inputs.token_ids, inputs.batch, self._caches)
        if not inputs.is_decode:  # padding's rows have logits too: a graph is of one shape
            is_first = inputs.is_leading
            hidden = hidden[: len(inputs.slots)] if is_first else hidden[inputs.sampled]
        logits = self._model.logits(hidden)
        return logits, self._model.sample(logits, inputs.draws)


def _as_it_is(computed: Tensor) -> Callable[[], Tensor]:
    return lambda: computed
