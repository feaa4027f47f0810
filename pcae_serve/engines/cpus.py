"""Count the CPUs that this process may use, by its affinity and its control group's quota.

In a container limited to two CPUs, a host of 64 shows all 64; a pool of that size is throttled.
"""

import os
from math import ceil
from pathlib import Path

from pcae_serve import control_groups
from pcae_serve.control_groups import MEMBERSHIP, MOUNT, Group


def count_usable() -> int:
    """Return the number of usable CPUs, at least one."""
    cpus = len(os.sched_getaffinity(0))
    limit = read_quota()
    return cpus if limit is None else max(1, min(cpus, ceil(limit)))


def read_quota(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> float | None:
    """Return the CPU quota of the control group and those above it, or None without a limit."""
    quotas = [_quota(group) for group in control_groups.groups("cpu", mount, membership)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(group: Group) -> float | None:
    if group.version == 2:  # microseconds per period or `max`, then the period
        allowed, _, period = (group.read("cpu.max") or "max").partition(" ")
        return None if allowed == "max" else int(allowed) / int(period or 100_000)
    allowed = group.read("cpu.cfs_quota_us") or "-1"  # -1: without a limit
    period = group.read("cpu.cfs_period_us") or ""
    return int(allowed) / int(period) if period and int(allowed) > 0 else None
