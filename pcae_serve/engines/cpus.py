"""Count the CPUs that this process may use, by its affinity and its control group's quota.

In a container limited to two CPUs, a host of 64 shows all 64; a pool of that size is throttled.
"""

import os
from math import ceil
from pathlib import Path

#: Where control groups are mounted, and the file that lists this process's groups.
MOUNT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def count_usable() -> int:
    """Return the number of usable CPUs, at least one."""
    cpus = len(os.sched_getaffinity(0))
    limit = read_quota()
    return cpus if limit is None else max(1, min(cpus, ceil(limit)))


def read_quota(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> float | None:
    """Return the CPU quota of the control group and those above it, or None without a limit."""
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
    """Return the group's folder and those above it. In a container, the path may not exist."""
    folder = mount / path.strip("/")
    return [each for each in (folder, *folder.parents) if each == mount or mount in each.parents]


def _v2(file: Path) -> float | None:
    """Read cpu.max: microseconds per period or `max`, then the period."""
    for line in _lines(file)[:1]:
        allowed, _, period = line.partition(" ")
        if allowed != "max":
            return int(allowed) / int(period or 100_000)
    return None


def _v1(folder: Path) -> float | None:
    """Read cpu.cfs_quota_us over cpu.cfs_period_us; -1 means that there is no limit."""
    allowed, period = _lines(folder / "cpu.cfs_quota_us"), _lines(folder / "cpu.cfs_period_us")
    return int(allowed[0]) / int(period[0]) if allowed and period and int(allowed[0]) > 0 else None


def _lines(file: Path) -> list[str]:
    """Return a file's lines, or none if it does not exist, as on other systems."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
