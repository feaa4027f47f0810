"""Cores that may be used, from made-up control groups."""

import os
from pathlib import Path

import pytest

from pcae_serve.engines import cpus
from tests.support.control_groups import group


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),  # a container with its own name space
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/../../outside\n", {"cpu.max": "300000 100000\n"}, 3.0),
        (
            "3:cpu,cpuacct:/docker/x\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "250000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        ("3:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "1"}, None),
        (
            "7:memory:/x\n",  # whose path is not one in the hierarchy of cpu
            {"cpu/x/cpu.cfs_quota_us": "100000", "cpu/x/cpu.cfs_period_us": "100000"},
            None,
        ),
    ],
)
def test_the_quota_of_a_group(
    tmp_path: Path, membership: str, files: dict[str, str], limit: float | None
) -> None:
    assert cpus.read_quota(*group(tmp_path, membership, files)) == limit


def test_systems_without_control_groups(tmp_path: Path) -> None:
    assert cpus.read_quota(tmp_path / "none", tmp_path / "nor") is None


def test_affinity_and_quota_both_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for limit, usable in ((None, 8), (2.5, 3), (0.2, 1), (64.0, 8)):
        monkeypatch.setattr(cpus, "read_quota", lambda limit=limit: limit)
        assert cpus.count_usable() == usable
