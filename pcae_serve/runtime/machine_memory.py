"""The memory budget of requests: a share of what the machine or its control group has."""

import logging
import os
from pathlib import Path

from pcae_serve import control_groups
from pcae_serve.control_groups import MEMBERSHIP, MOUNT, Group

log = logging.getLogger(__name__)

#: Share of a control group's limit that is planned with. The rest is for what is not predicted:
#: larger batches, fragments, garbage between two collections.
GROUP_SHARE = 0.8
#: Share of the machine's memory if there is no such limit: it has other processes, too.
MACHINE_SHARE = 0.5
#: Smallest default budget.
LEAST_BYTES = 64_000_000


def budget_bytes(memory_mb: float) -> int:
    """Return the bytes that requests may take: `memory_mb`, or the default if that is 0."""
    if memory_mb:
        log.info("memory: requests may take %s MB (--memory-mb)", f"{memory_mb:,.0f}")
        return int(memory_mb * 1e6)
    return default_budget_bytes()


def default_budget_bytes() -> int:
    """Return the bytes that requests may take beyond what this process uses now, at rest."""
    limit, share, source = read_limit(), GROUP_SHARE, "the control group's limit"
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if limit is None or limit >= machine:
        limit, share, source = machine, MACHINE_SHARE, "the machine's memory"
    resident = resident_bytes()
    budget = max(LEAST_BYTES, int(share * limit) - resident)
    log.info(
        "memory: requests may take %s (--memory-mb), %d %% of %s of %s, less %s in use at rest",
        *(f"{budget / 1e6:,.0f} MB", 100 * share, source),
        *(f"{limit / 1e6:,.0f} MB", f"{resident / 1e6:,.0f} MB"),
    )
    if budget == LEAST_BYTES:
        log.warning("memory: little is left for requests; raise the limit or set --memory-mb")
    return budget


def read_limit(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> int | None:
    """Return the lowest memory limit of the control group and those above it, in bytes, or None."""
    limits = [_limit(group) for group in control_groups.groups("memory", mount, membership)]
    return min((limit for limit in limits if limit is not None), default=None)


def resident_bytes() -> int:
    """Return the memory of this process that is resident; 0 on systems without /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _limit(group: Group) -> int | None:
    text = group.read("memory.max" if group.version == 2 else "memory.limit_in_bytes")
    return None if text is None or text == "max" else int(text)
