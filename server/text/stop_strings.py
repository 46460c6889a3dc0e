"""Finds the first of some strings in text that comes in pieces. Knows no tokens.

Text that may be the beginning of a stop string is held back until it is clear.
"""

from __future__ import annotations


class StopStrings:
    """At most a few short strings (see the limits table), so a plain search is fast enough."""

    def __init__(self, strings: list[str], include: bool) -> None:
        self._strings = strings
        self._include = include
        self._held = ""
        self.matched: str | None = None
        """The string that was found: everything after it is dropped."""

    def feed(self, text: str) -> str:
        """What may be shown now."""
        if not self._strings or self.matched is not None:
            return text if self.matched is None else ""
        text = self._held + text
        # The one that is complete first, so that it does not matter how the text was cut.
        found = [(text.find(s) + len(s), -len(s), s) for s in self._strings if s in text]
        if found:
            return self._stop_at(text, *min(found))
        kept = len(text) - self._num_undecided(text)
        self._held = text[kept:]
        return text[:kept]

    def finish(self) -> str:
        """What was held back, when no more will come."""
        held, self._held = self._held, ""
        return held

    def _stop_at(self, text: str, end: int, _: int, string: str) -> str:
        self.matched, self._held = string, ""
        return text[:end] if self._include else text[: end - len(string)]

    def _num_undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._strings)) - 1)
        for length in range(longest, 0, -1):
            if any(s.startswith(text[-length:]) for s in self._strings):
                return length
        return 0
