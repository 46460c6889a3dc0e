"""What a boot tells of itself while it runs. Knows neither who listens nor how it gets there."""

from __future__ import annotations

from typing import Protocol


class BootReport(Protocol):
    def __call__(self, phase: str, bytes_done: int, bytes_total: int, detail: str) -> None:
        """The boot's own line: a phase begins, or the present one's next bytes are there."""

    def located(self, folder: str) -> None:
        """All files of the model are there, in this folder."""

    def beside(self, name: str, lane: str, began_s: float, ended_s: float) -> None:
        """Another thread, `lane`, did this from `began_s` to `ended_s` (time.monotonic())."""


class Unheard:
    """The report of a boot that nobody listens to."""

    def __call__(self, phase: str, bytes_done: int, bytes_total: int, detail: str) -> None:
        pass

    def located(self, folder: str) -> None:
        pass

    def beside(self, name: str, lane: str, began_s: float, ended_s: float) -> None:
        pass
