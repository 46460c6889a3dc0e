"""A checkpoint's tokenizer.json behind three verbs. Knows no requests and no templates.

`tokenizers` releases the GIL while it encodes, so that callers may do so in threads.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as HfTokenizer

from ...engine.errors import CheckpointError


class Tokenizer:
    """Encodes and decodes with the vocabulary of one model."""

    def __init__(self, tokenizer: HfTokenizer) -> None:
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self._longest_token_chars = max(map(len, vocabulary), default=1)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """Bytes that are no UTF-8 become U+FFFD; ids beyond the vocabulary become nothing."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def max_chars(self, num_tokens: int) -> int:
        """A longer text is more than `num_tokens` tokens, seen without encoding it.

        The factor leaves room for normalisers, which may shorten a text.
        """
        return 4 * num_tokens * self._longest_token_chars


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """None where the checkpoint has no tokenizer.json: such a model takes token ids only."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        return Tokenizer(HfTokenizer.from_file(str(path)))
    except Exception as error:
        raise CheckpointError(f"{path} is not a tokenizer that can be read: {error}") from error
