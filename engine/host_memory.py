"""How much of the machine's memory is free, within this process's cgroup. Plain files of Linux."""

from __future__ import annotations

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 62


def available_host_bytes() -> int:
    return min(machine_bytes(), cgroup_bytes())


def machine_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{meminfo} has no MemAvailable")


def cgroup_bytes(cgroup: Path = CGROUP) -> int:
    """What the cgroup still allows; page cache counts as free, because it can be dropped."""
    return min(
        _left(cgroup, "memory.max", "memory.current", "file"),
        _left(cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    )


def _left(cgroup: Path, limit_name: str, used_name: str, cache_name: str) -> int:
    """Of one version of cgroups; the other's files are not there."""
    try:
        limit = (cgroup / limit_name).read_text().strip()
        used = int((cgroup / used_name).read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:
        return UNLIMITED
    if limit == "max" or int(limit) >= UNLIMITED:
        return UNLIMITED
    return int(limit) - used + int(stat.get(cache_name, 0))
