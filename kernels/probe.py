"""Whether attention that others wrote computes what the reference does, on this device, today.

Their packages change with their versions, and a prompt must not be the first to find out. Asked
once, at load, of those that would be used. Knows the operations; knows no engine.
"""

from __future__ import annotations

import logging

import torch

from . import check
from .reference.case import Case
from .reference.paged_attention import Batch
from .table import Implementation

logger = logging.getLogger(__name__)

BY_OTHERS = ("flash", "pytorch")
PROMPTS, DECODES = [(40, 90), (1, 7), (9, 9)], [(1, 90), (1, 7), (1, 33)]
HEAD_DIM = 64


class Probe:
    """Answers for one device and dtype, and blocks of one size."""

    def __init__(self, device: torch.device, dtype: torch.dtype, block_size: int) -> None:
        self._device, self._dtype, self._block_size = device, dtype, block_size

    def __call__(self, implementation: Implementation, is_decode: bool) -> bool:
        if implementation.name not in BY_OTHERS:
            return True
        try:
            self._compare(implementation, DECODES if is_decode else PROMPTS)
        except Exception as error:  # whatever they raise, another one computes it
            phase = "decodes" if is_decode else "prompts"
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            logger.warning("attention of %s is not %s's: %s", phase, implementation.name, reason)
            return False
        return True

    def _compare(self, implementation: Implementation, sequences: list[tuple[int, int]]) -> None:
        batch = Batch(sequences, head_dim=HEAD_DIM, block_size=self._block_size)
        case = Case("probe", batch)
        arguments = case.make(self._device, self._dtype)
        if implementation.accepts(*arguments):
            actual = check.outcome(implementation.function(), arguments)
            wanted = check.expected(implementation.op, case, self._device, self._dtype)
            check.assert_close(actual, wanted, torch.bfloat16)  # float16 is held to it as well
