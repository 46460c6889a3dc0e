"""How many prompt tokens may join a step in which other sequences decode.

A prompt that is computed beside decoding sequences delays their next tokens. Told how long steps
took, this keeps the delay to a multiple of what a step without prompts takes: with one prompt under
way or waiting a step lasts at most `max_slowdown` times as long. The delay allowed grows with the
square root of the number of prompts: with a fixed one a busy server would have small batches and a
queue without end; in proportion to the number, one burst would stop all streams (`bench pace`
replays what each does to a trace).

Knows numbers of tokens, and seconds that it is told; knows no sequences and no clock.
"""

from __future__ import annotations

import math

MIN_TOKENS = 4
"""A prompt gets so many in every step: it must end, whatever was measured."""
REFRESH_STEPS = 32
"""After so many steps with prompts in a row, one without them shows what it takes now."""
RISE = 0.1
"""What is measured is noise and delay on top of the true time: lower is believed at once, higher
only by this share of the difference."""
TOKEN_WEIGHT = 0.3
"""Of the newest step, in the mean time of a prompt's token."""


class Pace:
    """`max_slowdown`: of a step by one prompt, 1 or more; 0: prompts take all there is."""

    def __init__(self, max_slowdown: float) -> None:
        self._max_slowdown = max_slowdown
        self._decode_s: dict[int, float] = {}
        self._token_s = 0.0
        self._num_mixed_steps = 0

    def prompt_budget(self, num_decodes: int, num_prompts: int, num_tokens: int) -> int:
        """Of `num_tokens` that have room, those that prompts may take beside `num_decodes` tokens.

        `num_prompts` are under way or waiting. 0: this step is to show what decodes take alone.
        """
        if not self._max_slowdown or not num_decodes or not num_prompts:
            return num_tokens
        decode_s = self._decode_s.get(_class_of(num_decodes))
        if decode_s is None or self._num_mixed_steps >= REFRESH_STEPS:
            return 0
        allowed_s = (self._max_slowdown - 1) * decode_s * math.sqrt(num_prompts)
        # Of a prompt's token nothing is known where every prompt so far was found in the cache.
        num_allowed = int(allowed_s / self._token_s) if self._token_s else 0
        return min(num_tokens, max(_rounded(num_allowed), MIN_TOKENS))

    def learn(self, num_decodes: int, num_prompt_tokens: int, spent_s: float) -> None:
        """What a step of so many took."""
        if not num_prompt_tokens:
            self._num_mixed_steps = 0
            self._learn_decode(_class_of(num_decodes), spent_s)
        else:
            self._num_mixed_steps += num_decodes > 0
            self._learn_token(num_decodes, num_prompt_tokens, spent_s)

    def _learn_decode(self, size: int, spent_s: float) -> None:
        known_s = self._decode_s.get(size, spent_s)
        rise_s = max(0.0, spent_s - known_s)
        self._decode_s[size] = min(spent_s, known_s) + RISE * rise_s

    def _learn_token(self, num_decodes: int, num_tokens: int, spent_s: float) -> None:
        decode_s = self._decode_s.get(_class_of(num_decodes), 0.0) if num_decodes else 0.0
        token_s = max(0.0, spent_s - decode_s) / num_tokens
        self._token_s += (TOKEN_WEIGHT if self._token_s else 1.0) * (token_s - self._token_s)


def _rounded(num_tokens: int) -> int:
    """Down to one of eight numbers between powers of two: a step of a shape that was met before
    costs less than one that is new."""
    unit = max(1, (1 << num_tokens.bit_length()) // 16)
    return num_tokens // unit * unit


def _class_of(num_decodes: int) -> int:
    """Sizes of steps that take about as long: up to 1, 2, 4, 8 and so on."""
    return (num_decodes - 1).bit_length()
