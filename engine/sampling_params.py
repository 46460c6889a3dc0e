"""How one request wants its tokens chosen. Plain values; knows nothing about torch or protobuf.

Ranges live in `limits.py`; `SamplingParams` is only built after they were checked.
"""

from __future__ import annotations

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """One request's sampling, complete: every field has its value, none means "unset".

    The order of application follows Hugging Face's processors: logit_bias, penalties,
    min_tokens mask, temperature, top_k, top_p, min_p, then one draw.
    `temperature == 0` is greedy. Logprobs are those of the model's own distribution, before all
    of it.
    """

    max_tokens: int = 512
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt and output (CTRL)."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    """Unsigned 64 bit; the front draws one when the request has none."""
    n: int = 1
    num_logprobs: int = -1
    """-1: none; 0: the chosen token's; k: also the k most likely tokens'."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
