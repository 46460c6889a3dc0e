"""What an operator asks of the engine. Frozen and flat; facts found later are ModelFacts."""

from __future__ import annotations

import msgspec


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Zero or "auto" means: the engine decides from the model and the machine, and says what."""

    model: str
    """Folder of a Hugging Face checkpoint."""
    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int = 0
    max_num_seqs: int = 64
    max_batched_tokens: int = 2048
    kv_cache_bytes: int = 0
    block_size: int = 16
    prefix_cache: bool = True
    num_threads: int = 0
    heartbeat_interval_s: float = 0.25
