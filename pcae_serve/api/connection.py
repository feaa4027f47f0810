"""One HTTP/1.1 connection: uvicorn's httptools protocol, bounded in time, bytes and parser events.

    receive bytes → Framing: one part of one request → llhttp → ASGI → answer → next request

Requests on a connection are parsed one after the other: the bytes of the next one wait until the
current one is answered. A request that is not valid HTTP gets a problem document, like every other
error, and its connection closes.
"""

import asyncio
import uuid
from typing import Any

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from pcae_serve.api.connection_limit import SURPLUS, ConnectionLimit
from pcae_serve.api.framing import (
    Framing,
    Part,
    check_headers,
    check_target_length,
    split_target,
)
from pcae_serve.api.problems import refusal
from pcae_serve.errors import MalformedHttp, RequestError, one_line
from pcae_serve.observability import logs

#: Time limit for a request's head to arrive, from the connection or the previous answer.
HEAD_S = 15.0
#: Time that a body may still arrive after its request was answered, before the connection closes.
LINGER_S = 2.0
#: A connection is aborted if its client reads nothing of an answer for this time.
READ_S = 30.0
#: Bytes read from a connection at a time, and bytes of later requests that are kept while one is
#: answered. Each read is parsed in one go: small reads let other connections take their turn.
MAX_READ_BYTES = 16_384

#: Key in the ASGI scope's state: the connection of the request.
_CONNECTION = "connection"


class Connection(HttpToolsProtocol):
    """A connection with a timeout for each phase: an idle connection holds a file descriptor."""

    def __init__(
        self,
        *args: Any,
        limit: ConnectionLimit,
        max_body_bytes: int,
        access_log: bool = True,
        **kwargs: Any,
    ) -> None:
        """Take uvicorn's arguments, and those that `functools.partial` adds.

        max_body_bytes: of any route. access_log: log requests that are refused before the
        application sees them.
        """
        super().__init__(*args, **kwargs)
        self._limit, self._logs_access = limit, access_log
        self.url = b""
        self.body_error: RequestError | None = None  # why the current body cannot be read
        self._max_body_bytes = max_body_bytes
        self._framing = Framing(max_body_bytes)
        self._unparsed = b""
        self._upgraded = False  # the parser only reads a body, see `_read_body_after_upgrade`
        self._last = False  # the client has announced that this is its last request
        self._finished = False  # nothing more is parsed
        self._read_timer: asyncio.TimerHandle | None = None

    # the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.max_size = MAX_READ_BYTES  # type: ignore[attr-defined]
        self._head_timer = self.loop.call_later(HEAD_S, self._close)
        if not self._limit.add(self):
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._finished = True
        self._limit.remove(self)
        self._head_timer.cancel()
        if self._read_timer is not None:
            self._read_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._finished:
            return
        self._unset_keepalive_if_required()
        self._unparsed = self._unparsed + data if self._unparsed else data
        self._parse()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_timer = self.loop.call_later(READ_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_timer is not None:
            self._read_timer.cancel()

    def shutdown(self) -> None:
        """Close if idle; a request in progress is answered, and an answer is delivered."""
        if not self._finished:
            super().shutdown()

    # the parser

    def _parse(self) -> None:
        """Parse what has arrived, up to the end of a request that is not answered yet."""
        data, start, self._unparsed = self._unparsed, 0, b""
        try:
            while start < len(data) and not self._finished and self._framing.part != Part.COMPLETE:
                piece = self._framing.take(data, start)
                start += len(piece)
                self._feed(piece)
                self._framing.check_chunks()
                self._forward_body()
        except RequestError as error:
            self._refuse(error)
            return
        if self._finished or self.transport.is_closing():
            return
        self._unparsed = data[start:]
        if len(self._unparsed) > MAX_READ_BYTES:
            self.flow.pause_reading()

    def _feed(self, piece: bytes) -> None:
        """Parse a piece of one part of a request. Raise a RequestError if it is not valid."""
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            self._read_body_after_upgrade()
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, RequestError):  # raised by a callback
                raise error.__context__ from None
            reason = one_line(error).replace("`", "'")
            raise MalformedHttp(f"the request is not valid HTTP/1.1: {reason}") from None

    def _forward_body(self) -> None:
        """Wake the application for what was parsed of its request's body."""
        cycle = self.cycle
        if self._framing.part is Part.HEAD:
            return
        if cycle.response_complete:
            if self._framing.part is Part.COMPLETE:
                self._await_request()
            return
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        if cycle.body or not cycle.more_body:
            cycle.message_event.set()

    def _await_request(self) -> None:
        """Expect the head of the next request."""
        self._framing = Framing(self._max_body_bytes)
        if self._upgraded:
            self.parser, self._upgraded = httptools.HttpRequestParser(self), False
        self._limit.set_idle(self)
        self._head_timer.cancel()
        self._head_timer = self.loop.call_later(HEAD_S, self._close)

    # callbacks of the parser

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        check_target_length(self.url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._framing.add_header()
        if self._framing.part is Part.HEAD:  # trailers are counted and ignored
            super().on_header(name, value.rstrip(b" \t"))  # llhttp strips the start only

    def on_headers_complete(self) -> None:
        check_headers(self.parser.get_http_version(), self.headers)
        self.url, host = split_target(self.url)
        if host is not None:  # RFC 9112, 3.2.2: it replaces the header
            self.headers[:] = [(b"host", host), *(h for h in self.headers if h[0] != b"host")]
        surplus = self._limit.is_surplus(self)
        self.scope["state"] |= {_CONNECTION: self, SURPLUS: surplus}
        self._limit.set_busy(self)
        super().on_headers_complete()
        self._last = not self.cycle.keep_alive
        self.cycle.keep_alive &= not surplus
        self.cycle.transport = _AnswerTransport(self)  # type: ignore[assignment]
        self._framing.begin_body(self.headers)
        self._head_timer.cancel()

    def on_body(self, body: bytes) -> None:
        self._framing.add_payload(len(body))
        if not self.cycle.response_complete:
            self.cycle.body += body

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() and self._framing.part is not Part.HEAD:
            return  # the body follows, see `_read_body_after_upgrade`
        self._framing.complete()
        self.cycle.more_body = False

    def _read_body_after_upgrade(self) -> None:
        """Ignore `Upgrade`, as HTTP/1.1 allows, and read the body that follows the head.

        llhttp has left the request: what follows belongs to the other protocol. A parser that knows
        only how the body is framed reads it.
        """
        self._upgraded = True
        if self._framing.part is Part.COMPLETE:
            return
        self.parser = httptools.HttpRequestParser(_BodyCallbacks(self))
        framing = [
            name + b": " + value + b"\r\n"
            for name, value in self.headers
            if name in (b"content-length", b"transfer-encoding")
        ]
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(framing) + b"\r\n")

    # answers

    def on_response_complete(self) -> None:
        self.cycle.transport.flush()  # type: ignore[attr-defined]
        super().on_response_complete()
        if self._finished or self.transport.is_closing():
            return
        if self._framing.part is Part.COMPLETE:
            self._await_request()
            if self._unparsed:
                self._unset_keepalive_if_required()
                self._parse()
        else:
            # keep accepting an unread body for a while: its sender may read the answer only after
            self._limit.set_idle(self)
            self._head_timer = self.loop.call_later(LINGER_S, self._close)

    def _refuse(self, error: RequestError) -> None:
        """Answer a request that is not valid HTTP, and close the connection."""
        self._finished = True
        if self._framing.part is Part.HEAD:
            self._send_refusal(error)
            self.finish()
        elif self.cycle.response_complete:
            self.finish()
        else:  # the application answers: it reads the body, and raises the error (RaiseBodyErrors)
            self.body_error = error
            self.cycle.keep_alive = self.cycle.more_body = False
            self.cycle.message_event.set()

    def _send_refusal(self, error: RequestError) -> None:
        """Write the answer to a head that no application sees."""
        id_ = uuid.uuid4().hex
        path = self.url.partition(b"?")[0].decode("latin-1")
        if self._logs_access:
            fields = {"method": None, "path": path, "status": error.status, "ms": None}
            more = {"request_id": id_, "fields": fields}
            logs.access.info("- %s %d: %s", path or "-", error.status, error, extra=more)
        response = refusal(error, {"path": path})
        headers = [
            *self.server_state.default_headers,
            *response.raw_headers,
            (b"x-request-id", id_.encode()),
            (b"connection", b"close"),
        ]
        lines = [name + b": " + value + b"\r\n" for name, value in headers]
        head = b"".join([STATUS_LINE[error.status], *lines, b"\r\n"])
        self.transport.write(head + bytes(response.body))

    def finish(self) -> None:
        """Close after the last answer; read on for a while if the client may still send.

        The reset that follows data for a closed connection would discard the answer.
        """
        self._finished, self._unparsed = True, b""
        if self._last and self._framing.part is Part.COMPLETE:
            self.transport.close()
            return
        self._limit.set_idle(self)
        self._head_timer.cancel()
        self._head_timer = self.loop.call_later(LINGER_S, self._close)
        self.flow.resume_reading()
        self.transport.write_eof()

    def close_idle(self) -> None:
        """Close while no request is in progress, to make room for another connection."""
        self._finished = True
        self._close()

    def _close(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # the client does not read, so the buffer would never empty
        else:
            self.transport.close()


class _AnswerTransport:
    """What uvicorn writes an answer to.

    It writes head and body one after the other; they are sent together, which saves a system call
    and a packet. A close takes the rest of the request into account.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._transport = connection.transport
        self._pending = b""
        self.is_closing = connection.transport.is_closing

    def write(self, data: bytes) -> None:
        if self._pending:
            self._transport.write(self._pending + data)
            self._pending = b""
        else:
            self._pending = data
            self._connection.loop.call_soon(self.flush)

    def flush(self) -> None:
        if self._pending:
            self._transport.write(self._pending)
            self._pending = b""

    def close(self) -> None:
        self.flush()
        self._connection.finish()


class _BodyCallbacks:
    """Callbacks of a parser that is past a request's head."""

    def __init__(self, connection: Connection) -> None:
        self.on_body = connection.on_body
        self.on_header = connection.on_header
        self.on_message_complete = connection.on_message_complete


class RaiseBodyErrors:
    """ASGI middleware: whatever reads a body that stops being valid HTTP gets the error."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = scope.get("state", {}).get(_CONNECTION)

        async def receive_or_raise() -> Message:
            message = await receive()
            if connection.body_error is not None and message["type"] == "http.request":
                raise connection.body_error
            return message

        await self._app(scope, receive if connection is None else receive_or_raise, send)
