"""What the numbers of a scheduler must satisfy so that it can never come to a halt."""

from __future__ import annotations

from .errors import ConfigError


def check_limits(
    max_num_seqs: int, max_batched_tokens: int, num_blocks: int, block_size: int, context_len: int
) -> None:
    """Raises ConfigError."""
    if max_batched_tokens < max_num_seqs:
        raise ConfigError(
            f"max_batched_tokens is {max_batched_tokens}: it must be at least max_num_seqs "
            f"({max_num_seqs}), so that every running sequence can advance in one step"
        )
    if num_blocks * block_size < context_len:
        raise ConfigError(
            f"{num_blocks} blocks of {block_size} tokens cannot hold one sequence of "
            f"{context_len} tokens; lower max_model_len or raise kv_cache_bytes"
        )
