"""Amounts of memory as people write them: 512MiB, 4 GiB, 4096. Knows no option."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from ..engine.errors import ConfigError

UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
         "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}  # fmt: skip


def size_bytes(flag: str, value: Any) -> int:
    """4096, "4096", "512MiB", "4 GiB"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    unit = match and UNITS.get(match[2].lower())
    if not match or unit is None:
        raise ConfigError(f"{flag} is {value!r}: give bytes, or a number with KiB, MiB or GiB")
    return int(Decimal(match[1]) * unit)
