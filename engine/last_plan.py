"""What the last boot of an artefact settled on, beside it in the store: its plan of the memory.

A replica that boots again has the capacity it had, and not what this moment's free memory suggests;
where that much is no longer free, the cache is sized anew. What steps take of a card was measured
once and is not again. Knows JSON and the store; no device.
"""

from __future__ import annotations

import logging

import msgspec

from .config import EngineConfig
from .found_weights import FoundWeights
from .messages import ModelFacts

logger = logging.getLogger(__name__)


class Asked(msgspec.Struct, frozen=True):
    """All that an operator can say about it."""

    max_model_len: int
    max_num_seqs: int
    max_batched_tokens: int
    kv_cache_bytes: int
    kv_cache_dtype: str
    block_size: int
    gpu_memory_fraction: float
    gpu_memory_bytes: int
    attention: str
    prompt_attention: str
    deterministic: bool


class LastPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Holds for boots on the same card that are asked for the same."""

    asked: Asked
    card: str
    num_blocks: int
    context_len: int
    graph_bytes: int
    activation_bytes: int


def read_plan(found: FoundWeights, config: EngineConfig, card: str) -> LastPlan | None:
    """None where there is none, none for this card and this config, or none that is understood."""
    content = found.store.read_plan(found.key) if found.store else None
    if content is None:
        return None
    try:
        plan = msgspec.json.decode(content, type=LastPlan)
    except msgspec.MsgspecError as error:
        logger.info("the last boot's plan is of another kind and not used: %s", error)
        return None
    is_for_this = plan.asked == asked_of(config) and plan.card == card
    return plan if is_for_this and plan.num_blocks > 0 < plan.context_len else None


def write_plan(found: FoundWeights, config: EngineConfig, facts: ModelFacts) -> None:
    """Of a boot that is READY; nothing is written where nothing is new."""
    plan = LastPlan(
        asked_of(config),
        facts.card,
        facts.num_blocks,
        facts.context_len,
        facts.graph_bytes,
        facts.activation_bytes,
    )
    if found.store is not None and read_plan(found, config, facts.card) != plan:
        found.store.write_plan(found.key, msgspec.json.encode(plan))


def asked_of(config: EngineConfig) -> Asked:
    return Asked(
        config.max_model_len,
        config.max_num_seqs,
        config.max_batched_tokens,
        config.kv_cache_bytes,
        config.kv_cache_dtype,
        config.block_size,
        config.gpu_memory_fraction,
        config.gpu_memory_bytes,
        config.attention,
        config.prompt_attention,
        config.deterministic,
    )
