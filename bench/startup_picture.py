"""The picture of some starts: timelines above each other on one axis of seconds.

Needs matplotlib, the extra `bench`. Knows spans, nothing of what ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from ..engine.errors import ConfigError
from .startup_figures import Start

MISSING = "--picture needs matplotlib; install it: pip install 'pilotlight[bench]'"
SMALLEST_LABEL = 0.05
"""A phase shorter than this part of the axis is drawn without its name."""


def check_can_draw() -> None:
    """ConfigError before anything is measured."""
    if find_spec("matplotlib") is None:
        raise ConfigError(MISSING)


def draw(rows: Mapping[str, Start], file: Path) -> None:
    """One bar a name, from the spawn to the first token, split where its phases are known."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.7 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    longest_s = max(start.moments["first_token_s"] for start in rows.values())
    for row, start in enumerate(rows.values()):
        end_s = start.moments["first_token_s"]
        axes.barh(row, end_s, color="lightgrey")
        for number, span in enumerate(s for s in start.spans if not s.parent):
            axes.barh(row, span.seconds, left=span.started_s, color=f"C{number % 10}")
            if span.seconds > SMALLEST_LABEL * longest_s:
                middle_s = span.started_s + span.seconds / 2
                axes.text(middle_s, row, span.name, ha="center", va="center", fontsize=7)
        axes.text(end_s, row, f" {end_s:.2f} s", va="center")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, longest_s * 1.12)
    axes.set_xlabel("seconds from process start to the first token")
    FigureCanvasAgg(figure).print_png(str(file))
