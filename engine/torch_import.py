"""torch on its way in a thread of its own: every engine needs it, whatever it will load.

Imports nothing heavy at its top: it runs as the first thing of a process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from . import lean_torch

Span = tuple[str, float, float]
"""name, time.monotonic() at its start and at its end."""


class TorchImport:
    """Begins when it is made; `wait` for it."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="import-torch", daemon=True)
        self._thread.start()

    def wait(self) -> list[Span]:
        """What took how long; of the first wait only. Raises what the import raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        spans, self._spans = self._spans, []
        return spans

    def _run(self) -> None:
        try:
            self._import()
        except BaseException as error:
            self._error = error

    def _import(self) -> None:
        if lean_torch.has_cuda_driver():
            self._timed("torch.modules", lean_torch.import_whole)
        else:
            self._timed("torch.library", lean_torch.load_library)
            self._timed("torch.modules", lean_torch.import_lean)

    def _timed(self, name: str, work: Callable[[], None]) -> None:
        began_s = time.monotonic()
        work()
        self._spans.append((name, began_s, time.monotonic()))
