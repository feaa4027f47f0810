"""The limit of open file descriptors, and of connections, each of which takes one."""

import contextlib
import resource
import sys

#: Upper bound of the soft limit, which is usually 1,024.
MAX_DESCRIPTORS = 65_536
#: Descriptors that are not for connections: libraries, logs, a bundle that is loaded next to the
#: current one, decoding processes. A started server has about 10 open.
DESCRIPTOR_RESERVE = 128
#: Default limit of connections. An idle one takes about 13 kB of memory, and one with an incomplete
#: head of the largest size 45 kB: 190 MB if all are hostile.
MAX_CONNECTIONS = 4096


def raise_descriptor_limit() -> int:
    """Raise the soft limit to the hard limit, at most MAX_DESCRIPTORS. Returns the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def connection_capacity(max_connections: int) -> tuple[int, int]:
    """Return how many connections may be open, and how many descriptors remain for other uses.

    max_connections: as many as the operator wants; 0: MAX_CONNECTIONS. At most as many as the
    limit of descriptors allows, which is raised for it.
    """
    limit = raise_descriptor_limit()
    possible = limit - min(DESCRIPTOR_RESERVE, limit // 2)
    capacity = min(max_connections or MAX_CONNECTIONS, possible)
    return capacity, min(DESCRIPTOR_RESERVE, limit - capacity)
