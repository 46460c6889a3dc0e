"""Processors as the affinity mask and both versions of cgroups allow them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pilotlight.engine.host_cpus import usable_cpus


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("150000 100000", 2),
        ("5000 100000", 1),
        ("9000000 100000", 8),
        ("nonsense", 8),
    ],
)
def test_version_2(text: str, cpus: int, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert usable_cpus(tmp_path) == cpus


@pytest.mark.parametrize(("quota", "cpus"), [("-1", 8), ("300000", 3), ("", 8)])
def test_version_1(quota: str, cpus: int, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert usable_cpus(tmp_path) == cpus


def test_without_a_cgroup_the_mask_counts(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path) == 8
