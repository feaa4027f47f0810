"""The HTTP server around the application: signal handling and time-outs of idle connections.

    SIGTERM, SIGINT   drain: not ready, answer accepted requests, exit in bounded time
    a second one      exit now
    SIGHUP            reload the bundle

uvicorn implements HTTP.
"""

import asyncio
import contextlib
import signal
import socket
import time
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from pcae_serve.api.forwarded import ForwardedHeaders
from pcae_serve.api.problems import refusal
from pcae_serve.descriptors import raise_descriptor_limit
from pcae_serve.errors import Draining, RequestError
from pcae_serve.observability.logs import RequestId
from pcae_serve.runtime.service import Service

#: Time limit for a request's head to arrive, from the connection or the previous answer.
HEAD_S = 15.0
#: Time that a body may still arrive after its request was answered, before the connection closes.
LINGER_S = 2.0
#: A connection is aborted if its client reads nothing of an answer for this time.
READ_S = 30.0
#: Bytes read from a connection at a time.
MAX_READ_BYTES = 16_384
#: Time to send the last answers once the service has drained.
FLUSH_S = 2


class Connection(H11Protocol):
    """A connection with a time-out for each phase: an idle connection holds a file descriptor."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # each read is parsed in one go: small reads let other connections take their turn
        transport.max_size = MAX_READ_BYTES  # type: ignore[attr-defined]
        self._head_timer = self.loop.call_later(HEAD_S, self._close)
        self._read_timer: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        if self._read_timer is not None:
            self._read_timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._head_timer.cancel()

    def on_response_complete(self) -> None:
        before = self.cycle
        super().on_response_complete()
        self._head_timer.cancel()
        if self.cycle is not before or self.transport.is_closing():
            return  # the next request has begun, or there will be none
        # keep accepting an unread body for a while: its sender may read the answer only afterwards
        unread = self.conn.their_state is h11.SEND_BODY
        self._head_timer = self.loop.call_later(LINGER_S if unread else HEAD_S, self._close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_timer = self.loop.call_later(READ_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_timer is not None:
            self._read_timer.cancel()

    def _close(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # the client does not read, so the buffer would never empty
        else:
            self.transport.close()


class _RefuseCancelled:
    """ASGI middleware: answer 503 instead of 500 to a request that shutdown cancels."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except asyncio.CancelledError:
            if started or scope["type"] != "http":
                raise
            await refusal(Draining(), scope)(scope, receive, send)


class Server(uvicorn.Server):
    """uvicorn's server, extended to drain before it closes and to reload on SIGHUP."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        settings = service.settings
        logged = RequestId(_RefuseCancelled(app), access_log=settings.access_log)
        config = uvicorn.Config(
            ForwardedHeaders(logged, settings.trusted_proxies, settings.root_path or ""),
            http=Connection,
            log_config=None,
            proxy_headers=False,  # ForwardedHeaders applies them
            access_log=False,  # RequestId logs access, with the request's ID and tier
            ws="none",
            loop="asyncio",  # its transports have max_size; uvloop is not faster here
            timeout_keep_alive=5,  # the client's KEEP_ALIVE_S is below it
            timeout_graceful_shutdown=FLUSH_S,
        )
        super().__init__(config)
        self._service = service
        self._drained_at_s: float | None = None  # deadline of the drain; None: not draining
        self._reload: asyncio.Task[None] | None = None
        self._reload_wanted = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        raise_descriptor_limit()
        with contextlib.suppress(RuntimeError, ValueError):  # outside the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._begin_reload)
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; `on_tick` exits. uvicorn itself would exit with the signal."""
        if self._drained_at_s is not None:
            self.should_exit = self.force_exit = True
            return
        self._service.drain()
        self._drained_at_s = time.monotonic() + self._service.settings.drain_s

    async def on_tick(self, counter: int) -> bool:
        if self._drained_at_s is not None:
            if not self._service.unanswered:
                self.should_exit = True
            elif time.monotonic() > self._drained_at_s:
                self._service.refuse_unanswered()  # before connections are closed
                self.should_exit = True
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
