"""What an operator asks of the engine. Frozen and flat; facts found later are ModelFacts."""

from __future__ import annotations

import msgspec


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Zero or "auto" means: the engine decides from the model and the machine, and says what."""

    model: str
    """Folder of a Hugging Face checkpoint, or where it is fetched from (see model_place.py); empty:
    be on standby, with everything but a model."""
    device: str = "auto"
    dtype: str = "auto"
    head_dtype: str = "auto"
    """Of the last product's matrix; auto: as in the checkpoint; int8: rounded when it is packed."""
    max_model_len: int = 0
    max_num_seqs: int = 64
    max_batched_tokens: int = 2048
    max_decode_slowdown: float = 2.0
    """Of a step by the prompt that is computed in it; see pace.py. 0: no limit."""
    max_overtaking: float = 1.0
    """Of a prompt by shorter ones, in its own lengths; see turns.py. 0: in order of arrival."""
    kv_cache_bytes: int = 0
    kv_cache_dtype: str = "auto"
    """plain: that of the weights; int8: with a scale per token and head; fp8: e4m3, without; auto:
    plain, or int16 where those are multiplied faster."""
    gpu_memory_fraction: float = 0.9
    """Of the card's memory, all that this engine may take: weights, cache, graphs, the rest."""
    gpu_memory_bytes: int = 0
    """The same in bytes; 0: as the fraction says."""
    block_size: int = 16
    attention: str = "auto"
    """Where attention is taken from, of the folders in kernels/; auto: the first that can."""
    prompt_attention: str = "auto"
    """The same, of prompts alone; auto: as `attention` says."""
    deterministic: bool = False
    """A request's tokens are the same whatever else runs."""
    prefix_cache: bool = True
    speculative: str = "auto"
    """ngram: guess tokens from the sequence's own text; auto: only where it pays; off."""
    overlap: str = "auto"
    """on: a step is scheduled and on its way while the one before it is computed; off; auto: on
    where the device computes by itself."""
    num_threads: int = 0
    heartbeat_interval_s: float = 0.25
    log_level: str = "info"
    cache: str = ""
    """Root of the weights cache; empty: none is read or written."""
    verify: str = "full"
    """Of an artefact's chunks: full: before READY; lazy: behind it; off."""


class SupervisionPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What happens to an engine that stalls or dies."""

    restarts: bool = True
    """False: the server exits when its engine does."""
    max_restarts: int = 5
    restart_backoff_s: float = 0.5
    """Doubled at each restart in a row."""
    heartbeat_timeout_s: float = 3.0
    progress_timeout_s: float = 30.0
    stall_kill_s: float = 10.0
    """A stalled engine is killed after this long."""
    judge_interval_s: float = 0.1
