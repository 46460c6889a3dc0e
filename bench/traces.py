"""Reads traces of real traffic, CSV with a header or JSON lines; columns are found by name.

Known are the Azure LLM inference traces, the Mooncake traces and Vidur's processed traces, the
last of which have lengths but no times. Knows no server and draws nothing.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..engine.errors import ConfigError
from .arrivals import Planned

INPUT_COLUMNS = (
    "contexttokens", "input_length", "num_prefill_tokens", "input_len", "input_tokens",
    "prompt_tokens", "prompt_len",
)  # fmt: skip
OUTPUT_COLUMNS = (
    "generatedtokens", "output_length", "num_decode_tokens", "output_len", "output_tokens",
    "completion_tokens",
)  # fmt: skip
TIME_COLUMNS = {
    "timestamp": 1e-3,
    "timestamp_ms": 1e-3,
    "arrival_ms": 1e-3,
    "arrived_at": 1.0,
    "arrival_time": 1.0,
    "arrival_s": 1.0,
}
"""What a number in the column counts, in seconds. A date is a date in any of them."""


@dataclass(frozen=True, slots=True)
class Trace:
    """In the order of arrival, the first at 0. Without times all are at 0."""

    plans: list[Planned]
    has_times: bool

    def faster(self, speed: float) -> Trace:
        plans = [replace(planned, at_s=planned.at_s / speed) for planned in self.plans]
        return Trace(plans, self.has_times)


@dataclass(frozen=True, slots=True)
class _Columns:
    """The names as the file spells them; `time` is empty where there are no times."""

    time: str
    input: str
    output: str

    def planned(self, row: dict[str, Any]) -> Planned:
        at_s = _seconds(row[self.time], TIME_COLUMNS[self.time.lower()]) if self.time else 0.0
        return Planned(at_s, int(row[self.input]), int(row[self.output]))


def read_trace(path: Path) -> Trace:
    """Raises ConfigError with the file's name, the row and what is wrong with it."""
    plans: list[Planned] = []
    columns: _Columns | None = None
    try:
        for row in _rows(path):
            columns = columns or _columns(path, row)
            plans.append(columns.planned(row))
    except OSError as error:
        raise ConfigError(f"cannot read trace {path}: {error.strerror}") from error
    except KeyError as error:
        raise ConfigError(f"trace {path}: row {len(plans) + 1} lacks {error}") from error
    except (ValueError, TypeError, csv.Error) as error:
        # Not its repr: that of an error of encoding holds the whole file.
        message = f"trace {path}: row {len(plans) + 1} cannot be read: {error}"
        raise ConfigError(message) from error
    if columns is None:
        raise ConfigError(f"trace {path} is empty")
    return _from_zero(plans, bool(columns.time))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        if path.suffix in (".jsonl", ".json"):
            yield from (json.loads(line) for line in lines if line.strip())
        else:
            yield from csv.DictReader(lines, skipinitialspace=True)


def _columns(path: Path, row: dict[str, Any]) -> _Columns:
    spelled = {str(name).lower(): str(name) for name in row}
    time, input_, output = (
        next((spelled[name] for name in names if name in spelled), "")
        for names in (TIME_COLUMNS, INPUT_COLUMNS, OUTPUT_COLUMNS)
    )
    if not (input_ and output):
        raise ConfigError(
            f"trace {path} has no columns of input and output lengths: it has "
            f"{', '.join(spelled.values())[:200]}; understood are {', '.join(INPUT_COLUMNS[:3])} "
            f"and {', '.join(OUTPUT_COLUMNS[:3])}"
        )
    return _Columns(time, input_, output)


def _seconds(value: str | float, unit_s: float) -> float:
    """A date without a zone counts as UTC: a local clock that is set back would bend the gaps."""
    try:
        at_s = float(value) * unit_s
    except ValueError:
        date = datetime.fromisoformat(str(value))
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(at_s):
        raise ValueError(f"{value} is no time")
    return at_s


def _from_zero(plans: list[Planned], has_times: bool) -> Trace:
    plans = sorted(plans, key=lambda planned: planned.at_s)
    start_s = plans[0].at_s
    return Trace([replace(planned, at_s=planned.at_s - start_s) for planned in plans], has_times)
