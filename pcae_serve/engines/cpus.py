"""Cores that this process may really use: its affinity, and its control group's quota.

A container limited to two CPUs on a host of 64 sees 64; a pool of that size is throttled.
"""

import os
from math import ceil
from pathlib import Path

#: Where control groups are mounted, and which of them this process is in.
MOUNT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def count_usable() -> int:
    """Cores to plan threads for, at least one."""
    cores = len(os.sched_getaffinity(0))
    limit = read_quota()
    return cores if limit is None else max(1, min(cores, ceil(limit)))


def read_quota(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> float | None:
    """CPUs that the control group, or one above it, allows; None where nothing limits them."""
    limits = []
    for line in _lines(membership):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            limits += [_v2(folder / "cpu.max") for folder in _upwards(mount, path)]
        elif "cpu" in controllers.split(","):
            root = mount / controllers if (mount / controllers).is_dir() else mount / "cpu"
            limits += [_v1(folder) for folder in _upwards(root, path)]
    return min((limit for limit in limits if limit is not None), default=None)


def _upwards(mount: Path, path: str) -> list[Path]:
    """The group's folder and those above it. Inside a container the path may lie outside."""
    folder = mount / path.strip("/")
    return [each for each in (folder, *folder.parents) if each == mount or mount in each.parents]


def _v2(file: Path) -> float | None:
    """cpu.max: microseconds allowed in a period, or `max`, and the period."""
    for line in _lines(file)[:1]:
        allowed, _, period = line.partition(" ")
        if allowed != "max":
            return int(allowed) / int(period or 100_000)
    return None


def _v1(folder: Path) -> float | None:
    """cpu.cfs_quota_us over cpu.cfs_period_us; -1: no limit."""
    allowed, period = _lines(folder / "cpu.cfs_quota_us"), _lines(folder / "cpu.cfs_period_us")
    return int(allowed[0]) / int(period[0]) if allowed and period and int(allowed[0]) > 0 else None


def _lines(file: Path) -> list[str]:
    """None where there is no such file, as on other systems."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
