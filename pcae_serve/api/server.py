"""The HTTP server around the application: signal handling and drain.

    SIGTERM, SIGINT   drain: not ready, answer accepted requests, exit in bounded time
    a second one      exit now
    SIGHUP            reload the bundle

uvicorn implements HTTP, `connection` limits what one connection may do.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import time
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from pcae_serve.api.browser_access import browser_access
from pcae_serve.api.connection import Connection, RaiseBodyErrors
from pcae_serve.api.connection_limit import AcceptErrors, ConnectionLimit, RefuseSurplus
from pcae_serve.api.draining import CloseWhileDraining, RefuseCancelled
from pcae_serve.api.forwarded import ForwardedHeaders
from pcae_serve.api.image_requests import body_limit
from pcae_serve.descriptors import connection_capacity
from pcae_serve.errors import RequestError
from pcae_serve.observability.logs import RequestId
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings

#: Largest number of connections that wait to be accepted.
BACKLOG = 2048
#: Time that idle connections stay open after SIGTERM: their clients may be sending a request.
IDLE_S = 1.0
#: Time to send the last answers once the service has drained.
FLUSH_S = 2

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server, extended to drain before it closes and to reload on SIGHUP."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        settings = service.settings
        self._limit = _connection_limit(settings)
        config = uvicorn.Config(
            self._wrap(app, settings),
            http=partial(  # type: ignore[arg-type]
                Connection,
                limit=self._limit,
                max_body_bytes=body_limit(settings),
                access_log=settings.access_log,
            ),
            backlog=self._limit.accepts_per_turn,
            log_config=None,
            proxy_headers=False,  # ForwardedHeaders applies them
            access_log=False,  # RequestId logs access, with the request's ID and tier
            ws="none",
            lifespan="on",  # it starts the service
            loop="asyncio",  # its transports have max_size; uvloop is not faster here
            timeout_keep_alive=5,  # the client's KEEP_ALIVE_S is below it
            timeout_graceful_shutdown=FLUSH_S,
        )
        super().__init__(config)
        self._service = service
        self._drain_begin_s: float | None = None  # None: not draining
        self._reload: asyncio.Task[None] | None = None
        self._reload_wanted = False

    def _wrap(self, app: ASGIApp, settings: Settings) -> ASGIApp:
        """Return the application with what belongs to the server and not to a route."""
        app = browser_access(app, settings)
        app = CloseWhileDraining(
            RefuseCancelled(RaiseBodyErrors(app)), lambda: self._drain_begin_s is not None
        )
        app = RefuseSurplus(app)
        app = RequestId(app, access_log=settings.access_log)
        return ForwardedHeaders(app, settings.trusted_proxies, settings.root_path or "")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(AcceptErrors())
        with contextlib.suppress(RuntimeError, ValueError):  # outside the main thread
            loop.add_signal_handler(signal.SIGHUP, self._begin_reload)
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)  # asyncio has set what it accepts in one turn

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; `on_tick` exits. uvicorn itself would exit with the signal."""
        if self._drain_begin_s is not None:
            self.should_exit = self.force_exit = True
            return
        self._service.drain()
        self._drain_begin_s = time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        if self._drain_begin_s is not None:
            drained_s = time.monotonic() - self._drain_begin_s
            if drained_s > self._service.settings.drain_s:
                self._service.refuse_unanswered()  # before connections are closed
                self.should_exit = True
            elif not self._service.unanswered:
                self.should_exit |= not self.server_state.connections or drained_s > IDLE_S
        return await super().on_tick(counter)

    def _begin_reload(self) -> None:
        async def reload() -> None:
            while self._reload_wanted:
                # a running reload may have read the folder before it changed
                while self._service.reloading:
                    await asyncio.sleep(0.1)
                self._reload_wanted = False
                with contextlib.suppress(RequestError):  # the service logs it
                    await self._service.reload()

        self._reload_wanted = True
        if self._reload is None or self._reload.done():
            self._reload = asyncio.create_task(reload())


def _connection_limit(settings: Settings) -> ConnectionLimit:
    """Return the limit of connections that settings and descriptors allow."""
    capacity, reserve = connection_capacity(settings.max_connections)
    if settings.max_connections > capacity:
        log.warning(
            "max_connections is %d, but the limit of file descriptors allows %d; raise it"
            " (ulimit -n)",
            settings.max_connections,
            capacity,
        )
    return ConnectionLimit(capacity, reserve)
