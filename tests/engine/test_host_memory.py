"""Free memory as the machine and both versions of cgroups tell it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pilotlight.engine.host_memory import UNLIMITED, cgroup_bytes, machine_bytes


def test_the_machines_own(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:  7 kB\n")
    assert machine_bytes(meminfo) == 7 * 1024
    meminfo.write_text("MemTotal: 9 kB\n")
    with pytest.raises(OSError, match="MemAvailable"):
        machine_bytes(meminfo)


def _write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_version_2_counts_page_cache_as_free(tmp_path: Path) -> None:
    files = {
        "memory__max": "1000\n",
        "memory__current": "700",
        "memory__stat": "anon 300\nfile 400",
    }
    assert cgroup_bytes(_write(tmp_path / "v2", **files)) == 700


def test_version_1_does_so_too(tmp_path: Path) -> None:
    files = {
        "memory__limit_in_bytes": "1000",
        "memory__usage_in_bytes": "900",
        "memory__stat": "total_cache 100\ncache 1",
    }
    _write(tmp_path / "v1" / "memory", **files)
    assert cgroup_bytes(tmp_path / "v1") == 200


@pytest.mark.parametrize("limit", ["max", str(1 << 63)])
def test_without_a_limit_the_machine_is_the_limit(limit: str, tmp_path: Path) -> None:
    files = {"memory__max": limit, "memory__current": "1", "memory__stat": ""}
    assert cgroup_bytes(_write(tmp_path / "a", **files)) == UNLIMITED
    assert cgroup_bytes(tmp_path / "nothing") == UNLIMITED
