"""Empties the caches in which torch keeps memory that no tensor uses. Knows no models."""

from __future__ import annotations

import torch


def empty_caches() -> None:
    """Where a GPU was in use, its cached blocks and pinned staging go back to the driver."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
