"""The delay in a proxy on the same machine, counted against the request's budget.

The proxy stamps each request when it arrives (StampArrival); the server behind it reads the stamp
(SubtractDelay) and moves the request's arrival back by the time since then. Clocks of two machines
cannot be compared, so the stamp carries the boot ID, and stamps of other machines are ignored.
"""

import asyncio
import time
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

#: Header of the stamp: the boot ID and seconds of the machine's monotonic clock.
HEADER = b"x-pcae-arrival"
#: Key in the ASGI scope's state: seconds that the request spent in the proxy.
DELAY_S = "proxy_delay_s"
#: Longest delay that counts: as long as a budget can be.
MAX_DELAY_S = 3600.0


def _boot_id() -> str:
    """Return the ID of the machine's boot, equal in all its containers; empty if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class StampArrival:
    """ASGI middleware for the proxy: stamp each request, replacing any stamp of its client."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._boot_id = app, _boot_id()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            kept = [(name, value) for name, value in scope["headers"] if name.lower() != HEADER]
            stamp = f"{self._boot_id} {time.monotonic():.6f}".encode()
            scope = {**scope, "headers": [*kept, (HEADER, stamp)]}
        await self._app(scope, receive, send)


class SubtractDelay:
    """ASGI middleware for the server behind the proxy: read the stamp into the scope's state."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._boot_id = app, _boot_id()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            stamps = [value for name, value in scope["headers"] if name == HEADER]
            if len(stamps) == 1 and (seconds := self._since(stamps[0])) is not None:
                scope.setdefault("state", {})[DELAY_S] = seconds
        await self._app(scope, receive, send)

    def _since(self, stamp: bytes) -> float | None:
        boot_id, _, clock = stamp.decode("latin-1").partition(" ")
        try:
            seconds = time.monotonic() - float(clock)
        except ValueError:
            return None
        known = self._boot_id and boot_id == self._boot_id and isfinite(seconds)
        return min(max(0.0, seconds), MAX_DELAY_S) if known else None


def arrival_s(state: Mapping[str, Any]) -> float:
    """Return the arrival of a request in seconds of the loop's clock, less the proxy's delay."""
    delay_s: float = state.get(DELAY_S, 0.0)
    return asyncio.get_running_loop().time() - delay_s


def stamping() -> list[Middleware]:
    """Return StampArrival as a list of Starlette middleware, as Ray Serve's proxy takes it."""
    return [Middleware(StampArrival)]
