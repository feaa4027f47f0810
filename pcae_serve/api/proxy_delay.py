"""The hop before us: how long a request has been under way when this process gets to see it.

A proxy in front, on the same machine, stamps each request as it comes (Stamp); behind it the time
since then counts against the request's budget, whichever way that was told (Subtract). A clock of
another machine says nothing here, so a stamp from there is not read: the boot id tells.
It knows ASGI and no server.
"""

import asyncio
import time
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

#: What the stamp is told in: the boot's id and seconds of its monotonic clock.
HEADER = b"x-pcae-arrival"
#: Under this name the scope's state has the seconds that were lost before us.
UNDER_WAY_S = "under_way_s"
#: No request is longer under way than a budget can be.
MAX_S = 3600.0


def _boot_id() -> str:
    """Of the machine's start, the same in all of its containers; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class StampArrival:
    """ASGI middleware of the proxy: says when a request came, whatever its client said of it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._boot_id = app, _boot_id()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            kept = [(name, value) for name, value in scope["headers"] if name.lower() != HEADER]
            stamp = f"{self._boot_id} {time.monotonic():.6f}".encode()
            scope = {**scope, "headers": [*kept, (HEADER, stamp)]}
        await self._app(scope, receive, send)


class SubtractDelay:
    """ASGI middleware behind the proxy: reads the stamp."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._boot_id = app, _boot_id()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            stamps = [value for name, value in scope["headers"] if name == HEADER]
            if len(stamps) == 1 and (seconds := self._since(stamps[0])) is not None:
                scope.setdefault("state", {})[UNDER_WAY_S] = seconds
        await self._app(scope, receive, send)

    def _since(self, stamp: bytes) -> float | None:
        boot_id, _, clock = stamp.decode("latin-1").partition(" ")
        try:
            seconds = time.monotonic() - float(clock)
        except ValueError:
            return None
        known = self._boot_id and boot_id == self._boot_id and isfinite(seconds)
        return min(max(0.0, seconds), MAX_S) if known else None


def arrival_s(state: Mapping[str, Any]) -> float:
    """When a request arrived, by the loop's clock: now, less what it had been under way before."""
    under_way_s: float = state.get(UNDER_WAY_S, 0.0)
    return asyncio.get_running_loop().time() - under_way_s


def stamping() -> list[Middleware]:
    """For a proxy that takes Starlette's middlewares, as Ray Serve's does."""
    return [Middleware(StampArrival)]
