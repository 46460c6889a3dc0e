"""What a scheduler counts over its life. Knows nothing of what is counted."""

from __future__ import annotations

import msgspec


class Accounts(msgspec.Struct):
    """Under the names of EngineStatistics."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_computed_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0

    def count_prefix(self, num_tokens: int, num_found: int) -> None:
        self.prefix_query_tokens += num_tokens
        self.prefix_hit_tokens += num_found
