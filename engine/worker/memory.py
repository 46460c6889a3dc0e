"""How much memory one engine may take, and what it will take beside weights and cache.

Of a CUDA device it may take a share of the card, or so many bytes: two engines can share one. Of
this machine's memory there is what is free within the cgroup. Knows no tensors of a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import EngineConfig
from ..errors import NotEnoughMemory
from ..host_memory import available_host_bytes
from ..models.config import ModelConfig

HOST_FRACTION = 0.5
"""Of the memory left beside the weights: the rest is for activations and everybody else."""

# Guesses, until a card has been asked.
CONTEXT_BYTES = 600 << 20
"""Of a CUDA context and its libraries, which torch does not count."""

GRAPH_BYTES = 8 << 20
"""Of one captured decode step; all share one pool of intermediate results."""

LOGIT_COPIES = 4
"""Of each sampled row, in fp32: where it was computed, changed, sorted and summed."""

GIB = float(1 << 30)


@dataclass(frozen=True, slots=True)
class CardMemory:
    """Of a CUDA device, now. `own_bytes`: what this process has of it."""

    total_bytes: int
    free_bytes: int
    own_bytes: int


def card_memory(device: torch.device) -> CardMemory:
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return CardMemory(total_bytes, free_bytes, torch.cuda.memory_reserved(device) + CONTEXT_BYTES)


def available_bytes(device: torch.device) -> int:
    """Free, whoever may take it."""
    if device.type == "cuda":
        return card_memory(device).free_bytes
    return available_host_bytes()


def allowed_bytes(config: EngineConfig, card: CardMemory) -> int:
    """All that the engine may have of the card."""
    return config.gpu_memory_bytes or int(config.gpu_memory_fraction * card.total_bytes)


def left_bytes(config: EngineConfig, card: CardMemory) -> int:
    """What it may still take; negative where it already has more than it may."""
    return min(allowed_bytes(config, card) - card.own_bytes, card.free_bytes)


def check_weights_fit(num_bytes: int, config: EngineConfig, card: CardMemory) -> None:
    """Raises NotEnoughMemory before anything of them is read."""
    missing = num_bytes - left_bytes(config, card)
    if missing > 0:
        raise NotEnoughMemory(
            f"the weights take {num_bytes / GIB:.2f} GiB, {missing / GIB:.2f} GiB more than this "
            f"engine may still take: {allowed_bytes(config, card) / GIB:.2f} of the card's "
            f"{card.total_bytes / GIB:.2f} GiB, of which {card.free_bytes / GIB:.2f} are free; "
            "raise --gpu-memory-fraction or --gpu-memory-bytes, free the card, or quantise"
        )


def working_bytes(config: EngineConfig, model: ModelConfig, item_bytes: int) -> int:
    """Of the largest step's intermediate results, and of the graphs: an estimate from shapes."""
    heads = model.num_heads + 2 * model.num_kv_heads
    widths = 3 * model.hidden_size + (heads + model.num_heads) * model.head_dim
    widths += 3 * model.intermediate_size
    activations = config.max_batched_tokens * widths * item_bytes
    logits = config.max_num_seqs * model.vocab_size * (item_bytes + 4 * LOGIT_COPIES)
    return activations + logits + (4 + config.max_num_seqs // 8) * GRAPH_BYTES


def cache_budget(
    config: EngineConfig, model: ModelConfig, device: torch.device, item_bytes: int
) -> int:
    """For the KV cache, where nothing was asked for."""
    if device.type != "cuda":
        return int(HOST_FRACTION * available_host_bytes())
    left = left_bytes(config, card_memory(device))
    return max(0, left - working_bytes(config, model, item_bytes))
