"""Fixed input buffers: a Step becomes tensors at addresses that never change.

Knows slots and devices; knows no model and no sampling. Because the buffers are fixed, a CUDA
graph captured over them can be replayed for any later step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...kernels.draws import DRAW_WORDS, as_draws
from ..models.decoder import AttentionBatch
from ..step import Step
from .slots import SlotTables
from .staging import Staging

LONG_CONTEXT = 32768
"""Tokens: for longer ones no kernel sets aside more."""


class Buffer:
    """A host array and the device tensor that follows it; on a CPU they are one memory."""

    def __init__(self, shape: tuple[int, ...], staging: Staging) -> None:
        self._staging = staging
        self._host_tensor = staging.host(shape)
        self.host = self._host_tensor.numpy()
        self._device_tensor = staging.mirror(self._host_tensor)
        self._view, self._host_view = self._device_tensor, self._host_tensor

    def on_device(self, num_rows: int) -> Tensor:
        """The first `num_rows` rows, copied over where that is another memory."""
        if num_rows != len(self._view):
            self._view = self._device_tensor[:num_rows]
            self._host_view = self._host_tensor[:num_rows]
        self._staging.copy(self._host_view, self._view)
        return self._view


@dataclass(frozen=True, slots=True)
class StepInputs:
    """token_ids: [T]; sampled: [S] the tokens that are sampled after; slots, lengths: [S].

    A decode step may be filled up with rows of padding: then T is larger than S.
    """

    token_ids: Tensor
    batch: AttentionBatch
    sampled: Tensor
    slots: np.ndarray
    lengths: np.ndarray
    """Tokens of the sequence before the one to be sampled."""
    sampled_slots: Tensor
    """`slots`, on the device."""
    draws: Tensor
    """[S, DRAW_WORDS]: how they are sampled; of a decode step [T, DRAW_WORDS], padding greedily."""
    is_plain: bool
    """What is drawn is all that is asked for, of logits as they are."""
    is_decode: bool
    """Every row is one token, and is sampled after, or is padding."""
    is_leading: bool = True
    """Those sampled after are the first tokens, each a row of its own: no prompt ends here."""


class InputBuffers:
    """Room for `max_num_tokens` tokens in `max_num_rows` rows.

    Rows of padding read `padding_block`, which no sequence may have, and store nothing.
    """

    def __init__(
        self,
        tables: SlotTables,
        max_num_tokens: int,
        max_num_rows: int,
        block_size: int,
        staging: Staging,
        padding_block: int = 0,
    ) -> None:
        self._tables = tables
        self._block_size = block_size
        self._staging = staging
        self._padding_block = padding_block
        self._token_ids = Buffer((max_num_tokens,), staging)
        self._positions = Buffer((max_num_tokens,), staging)
        self._slot_mapping = Buffer((max_num_tokens,), staging)
        self._block_tables = Buffer((max_num_rows, tables.block_ids.shape[1]), staging)
        self._query_start = Buffer((max_num_rows + 1,), staging)
        self._context_lens = Buffer((max_num_rows,), staging)
        self._sampled = Buffer((max_num_rows,), staging)
        self._sampled_slots = Buffer((max_num_rows,), staging)
        self._draws = Buffer((max_num_rows, DRAW_WORDS), staging)
        self._draw_rows = as_draws(self._draws.host)
        self._newest_of = Buffer((max_num_rows,), staging)
        self._newest = staging.mirror(staging.host((len(tables.num_awaited),)))
        self._last: StepInputs | None = None
        """Of a step of decodes alone, and without drafts."""
        self._token_index = np.arange(max(max_num_tokens, max_num_rows) + 1, dtype=np.int32)

    def fill(self, step: Step, num_padded: Callable[[int], int] = lambda n: n) -> StepInputs:
        """Gathers the step's tokens; no loop runs over tokens.

        A step of n decodes alone is filled up to `num_padded(n)` rows.
        """
        if self._last is not None and _goes_on(step, self._last):
            return self._one_further(self._last)
        fields = [(r.slot, r.start, r.num_tokens, r.num_sampled) for r in step.rows]
        slots, starts, counts, samples = np.array(fields, dtype=np.int32).T
        if step.drafted:
            slots, starts, counts, samples = _token_by_token(slots, starts, counts, samples)
        num_rows, num_tokens = len(slots), int(counts.sum())
        self._staging.wait()
        num_blocks = self._fill_rows(slots, starts, counts)
        self._fill_tokens(slots, starts, counts, num_tokens)
        chosen = np.flatnonzero(samples)
        self._sampled.host[: len(chosen)] = self._query_start.host[1:][chosen] - 1
        is_decode = len(chosen) == num_tokens
        num_awaiting = self._find_awaited(slots)
        if is_decode:
            num_rows = num_tokens = self._pad(num_rows, num_padded(num_rows))
        sampled, lengths = slots[chosen], (starts + counts)[chosen]
        self._draw_rows[: len(sampled)] = self._tables.draws_at(sampled, lengths)
        inputs = self._staged(num_tokens, num_rows, sampled, lengths, is_decode)
        if self._staging.copies and not is_decode:  # a device's kernels go by the tables' width
            narrow = inputs.batch.block_tables[:, :num_blocks]
            inputs = replace(inputs, batch=replace(inputs.batch, block_tables=narrow))
        self._put_newest(inputs.token_ids[:num_awaiting])
        self._last = inputs if is_decode and not step.drafted else None
        return inputs

    def _one_further(self, last: StepInputs) -> StepInputs:
        """The same rows, each a token later: what stays is not filled again."""
        slots, num_rows = last.slots, len(last.slots)
        self._staging.wait()
        positions = self._positions.host[:num_rows]
        positions += 1
        self._context_lens.host[:num_rows] += 1
        self._fill_cells(slots, positions)
        begins_block = np.flatnonzero(positions % self._block_size == 0)
        if len(begins_block):
            index = positions[begins_block] // self._block_size
            blocks = self._tables.block_ids[slots[begins_block], index]
            self._block_tables.host[begins_block, index] = blocks
        num_awaiting = self._find_awaited(slots)
        lengths, num_all = last.lengths + 1, len(last.token_ids)
        if self._draw_rows["temperature"][:num_rows].any():
            self._draw_rows["uniform"][:num_rows] = self._tables.uniforms_at(slots, lengths)
        if self._staging.copies:
            inputs = self._staged(num_all, num_all, slots, lengths, is_decode=True)
        else:
            inputs = replace(last, lengths=lengths)
        self._put_newest(inputs.token_ids[:num_awaiting])
        self._last = inputs
        return inputs

    def keep_newest(self, inputs: StepInputs, token_ids: Tensor) -> None:
        """What was sampled, still on the device, for steps that come before the host knows it."""
        # A row that was not finite has no token; its sequence ends, and 0 is as good as any.
        self._newest[inputs.sampled_slots.long()] = token_ids.clamp(min=0).to(self._newest.dtype)

    def _find_awaited(self, slots: np.ndarray) -> int:
        """How many first rows of one token may have to wait for it."""
        if not self._tables.num_awaited.any():
            return 0
        is_awaited = self._tables.num_awaited[slots] > 0
        num_awaiting = int(np.max(np.flatnonzero(is_awaited), initial=-1)) + 1
        self._newest_of.host[:num_awaiting] = np.where(is_awaited, slots, -1)[:num_awaiting]
        return num_awaiting

    def _put_newest(self, token_ids: Tensor) -> None:
        if len(token_ids):
            slots = self._newest_of.on_device(len(token_ids)).long()
            self._staging.fence()
            newest = self._newest[slots.clamp(min=0)]
            token_ids.copy_(torch.where(slots < 0, token_ids, newest))

    def blank(self, num_rows: int) -> StepInputs:
        """A decode step of padding alone."""
        self._last = None
        self._staging.wait()
        self._query_start.host[0] = 0
        self._pad(0, num_rows)
        nothing = np.zeros(0, dtype=np.int32)
        return self._staged(num_rows, num_rows, nothing, nothing, is_decode=True)

    def largest(self) -> StepInputs:
        """A step of padding alone: as many tokens of prompts, and as often sampled, as may be.

        The last prompt is a late part of a long one, for which kernels set aside most.
        """
        self._last = None
        self._staging.wait()
        most_keys = self._block_tables.host.shape[1] * self._block_size
        num_rows = min(-(-len(self._token_ids.host) // most_keys), len(self._context_lens.host))
        num_tokens = min(len(self._token_ids.host), num_rows * most_keys)
        self._pad(0, num_rows)
        starts = np.minimum(self._token_index[: num_rows + 1] * most_keys, num_tokens)
        self._query_start.host[: num_rows + 1] = starts
        self._context_lens.host[:num_rows] = np.diff(starts)
        self._context_lens.host[num_rows - 1] = min(most_keys, max(num_tokens, LONG_CONTEXT))
        self._token_ids.host[:num_tokens] = self._positions.host[:num_tokens] = 0
        self._slot_mapping.host[:num_tokens] = -1
        num_sampled = min(len(self._sampled.host), num_tokens)
        self._sampled.host[:num_sampled] = self._token_index[:num_sampled]
        self._draws.host[:num_sampled] = 0
        nothing = np.zeros(num_sampled, dtype=np.int32)
        return self._staged(num_tokens, num_rows, nothing, nothing, is_decode=False)

    def _pad(self, begin: int, end: int) -> int:
        """Rows of one token at position 0, in nobody's block, and no cell to be stored in."""
        self._token_ids.host[begin:end] = 0
        self._positions.host[begin:end] = 0
        self._slot_mapping.host[begin:end] = -1
        self._block_tables.host[begin:end] = self._padding_block
        self._draws.host[begin:end] = 0
        self._context_lens.host[begin:end] = 1
        self._query_start.host[begin : end + 1] = self._token_index[begin : end + 1]
        return end

    def _staged(
        self,
        num_tokens: int,
        num_rows: int,
        slots: np.ndarray,
        lengths: np.ndarray,
        is_decode: bool,
    ) -> StepInputs:
        self._sampled_slots.host[: len(slots)] = slots
        batch = AttentionBatch(
            positions=self._positions.on_device(num_tokens),
            slot_mapping=self._slot_mapping.on_device(num_tokens),
            block_tables=self._block_tables.on_device(num_rows),
            query_start=self._query_start.on_device(num_rows + 1),
            context_lens=self._context_lens.on_device(num_rows),
        )
        inputs = StepInputs(
            token_ids=self._token_ids.on_device(num_tokens),
            batch=batch,
            sampled=self._sampled.on_device(len(slots)),
            slots=slots,
            lengths=lengths,
            sampled_slots=self._sampled_slots.on_device(len(slots)),
            draws=self._draws.on_device(num_rows if is_decode else len(slots)),
            is_plain=bool(self._tables.is_plain[slots].all()),
            is_decode=is_decode,
            is_leading=not len(slots) or int(self._sampled.host[len(slots) - 1]) < len(slots),
        )
        self._staging.fence()
        return inputs

    def _fill_rows(self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> int:
        """The most blocks that one of them has."""
        num_rows = len(slots)
        np.cumsum(counts, out=self._query_start.host[1 : num_rows + 1])
        lengths = starts + counts
        self._context_lens.host[:num_rows] = lengths
        num_blocks = -(-int(lengths.max()) // self._block_size)
        tables = self._tables.block_ids
        self._block_tables.host[:num_rows, :num_blocks] = tables[slots, :num_blocks]
        return num_blocks

    def _fill_tokens(
        self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray, num_tokens: int
    ) -> None:
        first = starts - self._query_start.host[: len(slots)]
        positions = self._positions.host[:num_tokens]
        np.add(self._token_index[:num_tokens], np.repeat(first, counts), out=positions)
        self._fill_cells(np.repeat(slots, counts), positions)

    def _fill_cells(self, slots: np.ndarray, positions: np.ndarray) -> None:
        """Of tokens: which they are, and where their keys and values go."""
        num_tokens = len(positions)
        self._token_ids.host[:num_tokens] = self._tables.token_ids[slots, positions]
        index, offset = np.divmod(positions, self._block_size)
        cells = self._tables.block_ids[slots, index] * self._block_size + offset
        self._slot_mapping.host[:num_tokens] = cells


def _goes_on(step: Step, last: StepInputs) -> bool:
    """Whether the rows are those of the last step, each at the token that it sampled."""
    if step.admitted or step.drafted or len(step.rows) != len(last.slots):
        return False
    rows = zip(step.rows, last.slots.tolist(), last.lengths.tolist(), strict=True)
    return all(
        row.slot == slot and row.start == length and row.num_tokens == row.num_sampled == 1
        for row, slot, length in rows
    )


def _token_by_token(
    slots: np.ndarray, starts: np.ndarray, counts: np.ndarray, samples: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Rows that sample more than once, cut into rows of one token.

    To the kernels they are decodes like any other, so each token comes out of the same sums, bit
    for bit, as without drafts; as a chunk of a prompt it would not.
    """
    is_cut = samples > 1
    num_parts = np.where(is_cut, counts, 1)
    first_part = np.cumsum(num_parts, dtype=np.int32) - num_parts
    part = np.arange(num_parts.sum(), dtype=np.int32) - np.repeat(first_part, num_parts)
    return (
        np.repeat(slots, num_parts),
        np.repeat(starts, num_parts) + part,
        np.repeat(np.where(is_cut, 1, counts), num_parts),
        np.repeat(np.minimum(samples, 1), num_parts),
    )
