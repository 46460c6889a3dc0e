"""Token ids to text as they come, whole characters only. Knows no stop strings and no requests.

A token may be a part of a character, and what a token looks like may depend on the one before (a
leading space). So each new piece is the difference of two decodings that begin a little earlier.

    token_ids  [ ...... | context | unread ]      text of the unread = decode(context + unread)
                        prefix    read             minus decode(context)
"""

from __future__ import annotations

from .tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_UNREAD_TOKENS = 8
"""A character has at most four bytes, so at most four tokens: what is longer is not UTF-8."""


class Detokenizer:
    """The text of one sequence."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context: list[int] = []
        self._context_text = ""
        self._unread: list[int] = []

    def feed(self, token_ids: list[int]) -> str:
        """Text that is complete with these tokens; may be empty."""
        self._unread += token_ids
        text = self._decode(self._context + self._unread)
        is_whole = not text.endswith(REPLACEMENT) or len(self._unread) > MAX_UNREAD_TOKENS
        return self._take(text) if is_whole else ""

    def finish(self) -> str:
        """The rest, with U+FFFD for what is no character."""
        return self._take(self._decode(self._context + self._unread)) if self._unread else ""

    def _take(self, text: str) -> str:
        new = text[len(self._context_text) :]
        if new or len(self._unread) > MAX_UNREAD_TOKENS:
            self._context, self._unread = self._unread, []
            self._context_text = self._decode(self._context)
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)
