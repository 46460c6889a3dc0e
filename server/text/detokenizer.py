"""Token ids to text as they come, whole characters only. Knows no stop strings and no requests.

A token may be a part of a character, and what a token looks like may depend on the one before (a
leading space). So each new piece is the difference of two decodings that begin a little earlier.

    token_ids  [ ...... | context | unread ]      text of the unread = decode(context + unread)
                        prefix    read             minus decode(context)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_UNREAD_TOKENS = 8
"""A character has at most four bytes, so at most four tokens: what stays open for longer is not
UTF-8, and is shown as it is but for its end, which may yet begin a character."""


class Detokenizer:
    """The text of one sequence."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context: list[int] = []
        self._num_shown = 0
        """Characters of context and unread that were given out."""
        self._unread: list[int] = []

    def feed(self, token_ids: list[int]) -> str:
        """Text that is complete with these tokens; may be empty."""
        return "".join(map(self._feed_one, token_ids))

    def finish(self) -> str:
        """The rest, with U+FFFD for what is no character."""
        return self._decode(self._context + self._unread)[self._num_shown :]

    def _feed_one(self, token_id: int) -> str:
        self._unread.append(token_id)
        text = self._decode(self._context + self._unread)
        is_open, is_long = text.endswith(REPLACEMENT), len(self._unread) > MAX_UNREAD_TOKENS
        if is_open and not is_long:
            return ""
        new = text.removesuffix(REPLACEMENT)[self._num_shown :]
        if new or is_long:
            self._context, self._unread = self._unread, []
            self._num_shown = len(self._decode(self._context).removesuffix(REPLACEMENT))
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)
