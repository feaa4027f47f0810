"""The number of open connections, kept below the limit of file descriptors.

Beyond `capacity`, each new connection closes the one that has waited longest for a request, so a
flood of idle connections closes its own, and probes get through. If every connection has a request
in progress, a few surplus ones may still send probes; their other requests get 503. To accept only
once a connection has closed would delay probes, too.
"""

import asyncio
import errno
import logging
from typing import Any, Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from pcae_serve.api.health_routes import is_probe
from pcae_serve.api.problems import refusal
from pcae_serve.descriptors import DESCRIPTOR_RESERVE
from pcae_serve.errors import TooManyConnections
from pcae_serve.observability.throttle import Throttle

#: Key in the ASGI scope's state: True if the request's connection is a surplus one.
SURPLUS = "surplus_connection"

#: errno of an accept that the system has no resources for.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger(__name__)


class Closable(Protocol):
    """What the limit needs of a connection."""

    def close_idle(self) -> None: ...


class _Group:
    """Connections that share a limit."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.open = set[Closable]()
        self.idle = dict[Closable, None]()  # the longest idle first

    @property
    def full(self) -> bool:
        return len(self.open) >= self.capacity


class ConnectionLimit:
    """All open connections, and in which order the idle ones became so."""

    def __init__(self, capacity: int, reserve: int = DESCRIPTOR_RESERVE) -> None:
        """capacity: connections with full rights. reserve: descriptors beyond those."""
        self._regular, self._surplus = _Group(capacity), _Group(max(1, reserve // 4))
        self._group = dict[Closable, _Group]()
        self._throttle = Throttle(log)

    @property
    def accepts_per_turn(self) -> int:
        """Connections to accept in one turn of the event loop.

        Those of the next three turns are accepted before one that this turn closes is gone.
        """
        return max(1, self._surplus.capacity // 2)

    def add(self, connection: Closable) -> bool:
        """Add a connection, which is idle. Return whether it may stay."""
        group = self._regular
        if group.full:
            self._throttle.warning("the limit of %d connections is reached", group.capacity)
            group = group if group.idle else self._surplus
        if group.full:
            if not group.idle:
                return False
            longest = next(iter(group.idle))
            self.remove(longest)
            longest.close_idle()
        group.open.add(connection)
        group.idle[connection] = None
        self._group[connection] = group
        return True

    def is_surplus(self, connection: Closable) -> bool:
        return self._group.get(connection) is self._surplus

    def set_busy(self, connection: Closable) -> None:
        """Note that the connection has a request in progress."""
        if (group := self._group.get(connection)) is not None:
            group.idle.pop(connection, None)

    def set_idle(self, connection: Closable) -> None:
        """Note that the connection waits for a request."""
        if (group := self._group.get(connection)) is not None:
            group.idle[connection] = None

    def remove(self, connection: Closable) -> None:
        """Forget a connection that is closed, or about to be."""
        if (group := self._group.pop(connection, None)) is not None:
            group.open.discard(connection)
            group.idle.pop(connection, None)


class RefuseSurplus:
    """ASGI middleware: refuse the requests of surplus connections, except for probes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        surplus = scope["type"] == "http" and scope.get("state", {}).get(SURPLUS)
        if not surplus or is_probe(scope):
            await self._app(scope, receive, send)
            return
        error = TooManyConnections(
            "the limit of connections is reached, and all have a request in progress; retry later",
            retry_after_s=1,
        )
        await refusal(error, scope)(scope, receive, send)


class AcceptErrors:
    """Handler of the event loop's errors that logs those of accept as one line, at a limited rate.

    asyncio reports each of them with a traceback, thousands in a second, and retries after 1 s.
    """

    def __init__(self) -> None:
        self._throttle = Throttle(log)

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        accepts = "accept" in context.get("message", "")
        if accepts and isinstance(error, OSError) and error.errno in _EXHAUSTED:
            self._throttle.warning("cannot accept connections: %s", error.strerror)
        else:
            loop.default_exception_handler(context)
