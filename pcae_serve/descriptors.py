"""Raise the limit of open file descriptors; every connection takes one."""

import contextlib
import resource
import sys

#: Upper bound of the soft limit, which is usually 1,024.
MAX_DESCRIPTORS = 65_536
#: Descriptors that are not for connections: libraries, logs, a bundle that is loaded next to the
#: current one, decoding processes. A started server has about 10 open.
DESCRIPTOR_RESERVE = 128


def raise_descriptor_limit() -> int:
    """Raise the soft limit to the hard limit, at most MAX_DESCRIPTORS. Returns the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def descriptor_reserve(limit: int) -> int:
    """Return how many of `limit` descriptors are not for connections."""
    return min(DESCRIPTOR_RESERVE, limit // 2)
