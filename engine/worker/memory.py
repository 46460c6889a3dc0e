"""How much memory one engine may take, and what is left of it for the KV cache.

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

CONTEXT_BYTES = 600 << 20
"""Of a CUDA context and its libraries, which torch does not count: a guess for all cards."""

LATER_GRAPH_BYTES = 8 << 20
"""Of one captured after READY; what it computes lies where that of the others does."""

LOGIT_COPIES = 4
"""Of each sampled row, in fp32: where its logits are changed, and log probabilities taken."""

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


def later_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """What no rehearsal shows: graphs of more sizes, and logits that a request has changed."""
    logits = config.max_num_seqs * model.vocab_size * 4 * LOGIT_COPIES
    return logits + config.max_num_seqs // 8 * LATER_GRAPH_BYTES


def cache_budget(
    config: EngineConfig, model: ModelConfig, device: torch.device, working_bytes: int
) -> int:
    """For the KV cache, where nothing was asked for; steps take `working_bytes` beside it."""
    if device.type != "cuda":
        return int(HOST_FRACTION * available_host_bytes())
    left = left_bytes(config, card_memory(device))
    return max(0, left - working_bytes - later_bytes(config, model))
