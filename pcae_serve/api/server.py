"""The HTTP server around the application: signals, and connections that nothing comes from.

    SIGTERM, SIGINT   not ready from then on; what is in hand is answered; exit, in bounded time
    a second one      exit now
    SIGHUP            reload the bundle

uvicorn speaks HTTP. This knows its life cycle, and of the service only what signals ask of it.
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

from pcae_serve.api.problems import refusal
from pcae_serve.descriptors import raise_descriptor_limit
from pcae_serve.errors import Draining, RequestError
from pcae_serve.observability.logs import RequestId
from pcae_serve.runtime.service import Service

#: The head of a request must be there so long after its connection was made, or was last used.
HEAD_S = 15.0
#: A body that nobody wants comes for so long after its answer; then the connection is closed.
LINGER_S = 2.0
#: A client that reads nothing of its answer for so long is gone.
READ_S = 30.0
#: Bytes taken from a connection at a time.
MAX_AT_ONCE = 16_384
#: After the last answer has been made, for it to be sent.
FLUSH_S = 2


class Connection(H11Protocol):
    """A connection that is closed where no whole head comes: idle ones cost a descriptor each."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # what comes at once is parsed at once: in small parts, that others have their turn
        transport.max_size = MAX_AT_ONCE  # type: ignore[attr-defined]
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
            return  # the next request was there already, or there will be none
        # a body that is not read is let come for a while: its sender may not see the answer before
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
            self.transport.abort()  # it does not read, either
        else:
            self.transport.close()


class _Cut:
    """ASGI middleware: a request that is cut off at the end is answered 503, not 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def told(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, told)
        except asyncio.CancelledError:
            if begun or scope["type"] != "http":
                raise
            await refusal(Draining())(scope, receive, send)


class Server(uvicorn.Server):
    """uvicorn, which drains before it closes."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        config = uvicorn.Config(
            RequestId(_Cut(app), access_log=service.settings.access_log),
            http=Connection,
            log_config=None,
            access_log=False,  # ours has the request's id and tier
            ws="none",
            loop="asyncio",  # whose transports say how much they read at once; ms are not counted
            timeout_keep_alive=5,  # clients go by it
            timeout_graceful_shutdown=FLUSH_S,
        )
        super().__init__(config)
        self._service = service
        self._drained_at_s: float | None = None  # at the latest, once draining
        self._reload: asyncio.Task[None] | None = None
        self._reload_wanted = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        raise_descriptor_limit()
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
                while self._service.reloading:  # by POST /admin/reload; the folder may have changed
                    await asyncio.sleep(0.1)
                self._reload_wanted = False
                with contextlib.suppress(RequestError):  # the service has logged it
                    await self._service.reload()

        self._reload_wanted = True
        if self._reload is None or self._reload.done():
            self._reload = asyncio.create_task(reload())
