"""How many processors this process may use at once. Plain files of Linux."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cpus(cgroup: Path = CGROUP) -> int:
    """Those of the affinity mask, within the cgroup's quota of time; one at least.

    A container of two CPUs' time on a machine of sixty-four sees all of them: threads for all would
    use their time up in a thirtieth of each period, and then stand still together.
    """
    return max(1, min(len(os.sched_getaffinity(0)), _quota(cgroup)))


def _quota(cgroup: Path) -> int:
    """Whole CPUs' worth, rounded up; as good as unlimited where nobody limits."""
    for limit, period in (_version_2(cgroup), _version_1(cgroup / "cpu")):
        if limit > 0 < period:
            return math.ceil(limit / period)
    return 1 << 30


def _version_2(cgroup: Path) -> tuple[int, int]:
    """cpu.max: "max 100000", or microseconds in each period."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
        return (0, 0) if limit == "max" else (int(limit), int(period))
    except (OSError, ValueError):
        return 0, 0


def _version_1(cgroup: Path) -> tuple[int, int]:
    """-1 microseconds: no limit."""
    try:
        limit = int((cgroup / "cpu.cfs_quota_us").read_text())
        return limit, int((cgroup / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return 0, 0
