"""Fixed input buffers: a Step becomes tensors at addresses that never change.

Knows slots and devices; knows no model and no sampling. Because the buffers are fixed, a CUDA
graph captured over them can be replayed for any later step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..models.decoder import AttentionBatch
from ..step import Step
from .slots import SlotTables


class Buffer:
    """A host array and the device tensor that follows it; on a CPU they are one memory."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._host_tensor = torch.zeros(shape, dtype=torch.int32, pin_memory=is_cuda)
        self.host = self._host_tensor.numpy()
        self._device_tensor = self._host_tensor.to(device) if is_cuda else self._host_tensor

    def on_device(self, num_rows: int) -> Tensor:
        """The first `num_rows` rows, copied over where that is another memory."""
        view = self._device_tensor[:num_rows]
        if self._device_tensor is not self._host_tensor:
            view.copy_(self._host_tensor[:num_rows], non_blocking=True)
        return view


@dataclass(frozen=True, slots=True)
class StepInputs:
    """token_ids: [T]; sampled: [S] the tokens that are sampled after; slots, lengths: [S]."""

    token_ids: Tensor
    batch: AttentionBatch
    sampled: Tensor
    slots: np.ndarray
    lengths: np.ndarray
    """Tokens of the sequence before the one to be sampled."""
    is_decode: bool
    """Every row is one token, and is sampled after."""


class InputBuffers:
    """Room for `max_num_tokens` tokens in `max_num_rows` rows."""

    def __init__(
        self,
        tables: SlotTables,
        max_num_tokens: int,
        max_num_rows: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._tables = tables
        self._block_size = block_size
        self._token_ids = Buffer((max_num_tokens,), device)
        self._positions = Buffer((max_num_tokens,), device)
        self._slot_mapping = Buffer((max_num_tokens,), device)
        self._block_tables = Buffer((max_num_rows, tables.block_ids.shape[1]), device)
        self._query_start = Buffer((max_num_rows + 1,), device)
        self._context_lens = Buffer((max_num_rows,), device)
        self._sampled = Buffer((max_num_rows,), device)
        self._token_index = np.arange(max_num_tokens, dtype=np.int32)

    def fill(self, step: Step) -> StepInputs:
        """Gathers the step's tokens; no loop runs over tokens."""
        fields = [(r.slot, r.start, r.num_tokens, r.num_sampled) for r in step.rows]
        slots, starts, counts, samples = np.array(fields, dtype=np.int32).T
        if step.drafted:
            slots, starts, counts, samples = _token_by_token(slots, starts, counts, samples)
        num_rows, num_tokens = len(slots), int(counts.sum())
        self._fill_rows(slots, starts, counts)
        self._fill_tokens(slots, starts, counts, num_tokens)
        chosen = np.flatnonzero(samples)
        self._sampled.host[: len(chosen)] = self._query_start.host[1:][chosen] - 1
        batch = AttentionBatch(
            positions=self._positions.on_device(num_tokens),
            slot_mapping=self._slot_mapping.on_device(num_tokens),
            block_tables=self._block_tables.on_device(num_rows),
            query_start=self._query_start.on_device(num_rows + 1),
            context_lens=self._context_lens.on_device(num_rows),
        )
        return StepInputs(
            token_ids=self._token_ids.on_device(num_tokens),
            batch=batch,
            sampled=self._sampled.on_device(len(chosen)),
            slots=slots[chosen],
            lengths=(starts + counts)[chosen],
            is_decode=len(chosen) == num_tokens,
        )

    def _fill_rows(self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> None:
        num_rows = len(slots)
        np.cumsum(counts, out=self._query_start.host[1 : num_rows + 1])
        lengths = starts + counts
        self._context_lens.host[:num_rows] = lengths
        num_blocks = -(-int(lengths.max()) // self._block_size)
        tables = self._tables.block_ids
        self._block_tables.host[:num_rows, :num_blocks] = tables[slots, :num_blocks]

    def _fill_tokens(
        self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray, num_tokens: int
    ) -> None:
        first = starts - self._query_start.host[: len(slots)]
        positions = self._positions.host[:num_tokens]
        np.add(self._token_index[:num_tokens], np.repeat(first, counts), out=positions)
        slot_of = np.repeat(slots, counts)
        self._token_ids.host[:num_tokens] = self._tables.token_ids[slot_of, positions]
        blocks = self._tables.block_ids[slot_of, positions // self._block_size]
        cells = blocks * self._block_size + positions % self._block_size
        self._slot_mapping.host[:num_tokens] = cells


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
