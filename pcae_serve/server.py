"""The HTTP server around the application: signals, and connections that nothing comes from.

    SIGTERM, SIGINT   not ready from then on; what is in hand is answered; exit, in bounded time
    a second one      exit now
    SIGHUP            reload the bundle

uvicorn speaks HTTP. This knows its life cycle, and of the service only what signals ask of it.
"""

import asyncio
import contextlib
import resource
import signal
import socket
import time
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from pcae_serve.errors import RequestError
from pcae_serve.logs import RequestId
from pcae_serve.service import Service

#: The head of a request must be there so long after its connection was made, or was last used.
HEAD_S = 15.0
#: After the last answer has been made, for it to be sent.
FLUSH_S = 2


class Connection(H11Protocol):
    """A connection that is closed where no whole head comes: idle ones cost a descriptor each."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._requests_seen = 0
        self._head_timer = self.loop.call_later(HEAD_S, self._close_headless)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._head_timer.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._head_timer.cancel()
        self._head_timer = self.loop.call_later(HEAD_S, self._close_headless)

    def _close_headless(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn, which drains before it closes."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        config = uvicorn.Config(
            RequestId(app, access_log=service.settings.access_log),
            http=Connection,
            log_config=None,
            access_log=False,  # ours has the request's id and tier
            timeout_graceful_shutdown=FLUSH_S,
        )
        super().__init__(config)
        self._service = service
        self._drained_at_s: float | None = None  # at the latest, once draining
        self._reload: asyncio.Task[Any] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        _raise_descriptor_limit()
        with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._begin_reload)
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain first; `on_tick` ends it. Not told to uvicorn, which would die of the signal."""
        if self._drained_at_s is not None:
            self.should_exit = self.force_exit = True
            return
        self._service.drain()
        self._drained_at_s = time.monotonic() + self._service.settings.drain_s

    async def on_tick(self, counter: int) -> bool:
        if self._drained_at_s is not None and (
            not self._service.in_hand or time.monotonic() > self._drained_at_s
        ):
            self.should_exit = True
        return await super().on_tick(counter)

    def _begin_reload(self) -> None:
        async def reload() -> None:
            with contextlib.suppress(RequestError):  # the service has logged it
                await self._service.reload()

        self._reload = asyncio.create_task(reload())


def _raise_descriptor_limit() -> None:
    """As many connections as the machine allows: the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
