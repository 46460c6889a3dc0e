"""What the last boot of an artefact settled on, beside it in the store: the size of the KV cache.

A replica that boots again has the capacity it had, and not what this moment's free memory suggests;
where that much is no longer free, the cache is sized anew. Knows JSON and the store; no device.
"""

from __future__ import annotations

import logging

import msgspec

from .config import EngineConfig
from .found_weights import FoundWeights
from .messages import ModelFacts

logger = logging.getLogger(__name__)


class Asked(msgspec.Struct, frozen=True):
    """All that an operator can say about the size."""

    max_model_len: int
    max_num_seqs: int
    kv_cache_bytes: int
    kv_cache_dtype: str
    block_size: int
    gpu_memory_fraction: float
    gpu_memory_bytes: int


class LastPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Holds for boots that are asked for the same."""

    asked: Asked
    num_blocks: int
    context_len: int


def read_plan(found: FoundWeights, config: EngineConfig) -> LastPlan | None:
    """None where there is none, none for what is asked now, or none that can be understood."""
    content = found.store.read_plan(found.key) if found.store else None
    if content is None:
        return None
    try:
        plan = msgspec.json.decode(content, type=LastPlan)
    except msgspec.MsgspecError as error:
        logger.info("the last boot's plan is of another kind and not used: %s", error)
        return None
    is_usable = plan.asked == asked_of(config) and plan.num_blocks > 0 < plan.context_len
    return plan if is_usable else None


def write_plan(found: FoundWeights, config: EngineConfig, facts: ModelFacts) -> None:
    """Of a boot that is READY; nothing is written where nothing is new."""
    plan = LastPlan(asked_of(config), facts.num_blocks, facts.context_len)
    if found.store is not None and read_plan(found, config) != plan:
        found.store.write_plan(found.key, msgspec.json.encode(plan))


def asked_of(config: EngineConfig) -> Asked:
    return Asked(
        config.max_model_len,
        config.max_num_seqs,
        config.kv_cache_bytes,
        config.kv_cache_dtype,
        config.block_size,
        config.gpu_memory_fraction,
        config.gpu_memory_bytes,
    )
