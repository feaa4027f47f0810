"""Open-loop load generator: requests are sent at their scheduled times, not after responses.

    due times and bytes of all requests -> HTTP/1.1 on connections opened in advance -> Responses

One asyncio loop on one core. Requests are built before the run and responses are parsed after it;
in between it only sends, receives and records times.
"""

import asyncio
import gc
import re
import socket
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pcae_serve.descriptors import raise_descriptor_limit
from pcae_serve.errors import StartError, one_line
from pcae_serve.loadtest import progress

#: asyncio's timers are up to a millisecond late, so for this time before a request is due the loop
#: spins; it receives responses meanwhile.
SPIN_S = 1.5e-3
#: Maximum requests sent in one iteration of the loop, before responses are received.
BURST = 8
#: Connections opened at the same time, and idle ones kept in reserve during the run.
OPENING, RESERVE = 32, 4
#: Descriptors left for other files of this process.
OTHER_FILES = 64
#: Time from the opening of the connections to the first request.
LEAD_S = 0.1

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_HEAD_END = b"\r\n\r\n"


@dataclass
class Responses:
    """Responses to n requests. Times are seconds since the first request was due; NaN: never."""

    sent_s: NDArray[np.float64]  # [n]
    ended_s: NDArray[np.float64]  # [n]
    status: NDArray[np.int16]  # [n]; 0: no complete response
    bodies: list[bytes]
    faults: Counter[str] = field(default_factory=Counter)  # reasons for incomplete responses

    @classmethod
    def empty(cls, n: int) -> "Responses":
        return cls(np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, np.int16), [b""] * n)


def send(
    host: str,
    port: int,
    requests: Sequence[bytes],
    due_s: Sequence[float],
    connections: int,
    grace_s: float,
) -> Responses:
    """Send every request when it is due, then wait up to `grace_s` for outstanding responses.

    due_s: ascending. connections: opened in advance; more are opened if these are not enough.
    Raise StartError if no server listens.
    """
    return asyncio.run(_Sender(host, port, requests, due_s).run(connections, grace_s))


class _Sender:
    def __init__(
        self, host: str, port: int, requests: Sequence[bytes], due_s: Sequence[float]
    ) -> None:
        self._host, self._port = host, port
        self._requests, self._due_s = requests, due_s
        self.responses = Responses.empty(len(requests))
        self._next = self._ended = 0  # requests sent, requests ended
        self._zero_s = 0.0
        self._idle: list[_Connection] = []  # last used on top; the server may close older ones
        self._all: set[_Connection] = set()
        self._unsent: deque[int] = deque()  # due, but no connection is idle
        self._unsent_again: deque[int] = deque()  # lost once, waiting for an unused connection
        self._resent: set[int] = set()
        self._opening: set[asyncio.Task[None]] = set()

    async def run(self, connections: int, grace_s: float) -> Responses:
        self._loop, self._done = asyncio.get_running_loop(), asyncio.Event()
        self._max_connections = max(1, raise_descriptor_limit() - OTHER_FILES)
        try:
            await self._connect_first()
            wanted = min(connections, self._max_connections)
            while (missing := wanted - len(self._all)) > 0:
                await asyncio.gather(*(self._connect() for _ in range(min(OPENING, missing))))
        except OSError as error:
            raise StartError(
                f"cannot connect to {self._host}:{self._port}: {one_line(error)}"
            ) from None
        with _no_garbage_collection():
            self._zero_s = self._loop.time() + LEAD_S
            ticker = self._loop.create_task(self._show_progress())
            self._send_due()
            end_s = self._zero_s + self._due_s[-1] + grace_s
            with suppress(TimeoutError):
                async with asyncio.timeout_at(end_s):
                    await self._done.wait()
        ticker.cancel()
        self.responses.faults["no answer"] += len(self._requests) - self._ended
        for task in self._opening:
            task.cancel()
        for connection in list(self._all):
            connection.close()
        await asyncio.sleep(0)  # lets the transports close
        return self.responses

    def now_s(self) -> float:
        return self._loop.time() - self._zero_s

    def _send_due(self) -> None:
        """Send the requests that are due, and schedule the next call."""
        due_s, n = self._due_s, len(self._due_s)
        for _ in range(BURST):
            if self._next == n:
                return
            wait_s = due_s[self._next] - self.now_s()
            if wait_s > 0:
                break
            self._next += 1
            self._send(self._next - 1)
        else:
            wait_s = 0.0
        if wait_s > SPIN_S:
            self._loop.call_later(wait_s - SPIN_S, self._send_due)
        else:
            self._loop.call_soon(self._send_due)

    def _send(self, i: int) -> None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                self._send_on(connection, i)
                break
        else:
            self._unsent.append(i)
        if len(self._idle) < RESERVE:
            self._open_more()

    def _send_again(self, i: int) -> None:
        """Send a request on a connection that carried none yet, which no server is closing."""
        for connection in self._idle:
            if connection.usable and not connection.used:
                self._idle.remove(connection)
                self._send_on(connection, i)
                return
        self._unsent_again.append(i)
        self._open_more()

    def _send_on(self, connection: "_Connection", i: int) -> None:
        connection.send(i, self._requests[i])
        self.responses.sent_s[i] = self.now_s()

    def _open_more(self) -> None:
        waiting = len(self._unsent) + len(self._unsent_again)
        room = self._max_connections - len(self._all) - len(self._opening)
        for _ in range(min(room, RESERVE + waiting - len(self._opening))):
            task = self._loop.create_task(self._try_connect())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _connect_first(self) -> None:
        """Connect to the first address of the host that listens; use that address from then on."""
        infos = await self._loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(address[0]) for *_, address in infos))
        for i, address in enumerate(addresses):
            self._host = address
            try:
                return await self._connect()
            except OSError:
                if i == len(addresses) - 1:
                    raise

    async def _connect(self) -> None:
        await self._loop.create_connection(lambda: _Connection(self), self._host, self._port)

    async def _try_connect(self) -> None:
        try:
            await self._connect()
        except OSError as error:
            self.responses.faults["cannot connect"] += 1
            pending = self._unsent or self._unsent_again
            if not self._all and pending:  # no other connection can take it
                self.ended(pending.popleft(), 0, b"", one_line(error))

    def free(self, connection: "_Connection") -> None:
        """Make a connection available for the next request."""
        self._all.add(connection)
        if self._unsent_again and not connection.used:
            self._send_on(connection, self._unsent_again.popleft())
            return
        self._idle.append(connection)
        if self._unsent:
            self._send(self._unsent.popleft())

    def ended(self, i: int, status: int, body: bytes, fault: str = "") -> None:
        """Record the response of request `i`, or why there is none."""
        responses = self.responses
        responses.ended_s[i], responses.status[i] = self.now_s(), status
        responses.bodies[i] = body
        if fault:
            responses.faults[fault] += 1
        self._ended += 1
        if self._ended == len(self._requests):
            self._done.set()

    def lost(self, connection: "_Connection", i: int | None, unread: bool) -> None:
        """Handle a closed connection.

        i: its outstanding request. unread: the server closed a kept connection before it read
        the request; such a request is sent once more, as HTTP clients do, and its time continues.
        """
        self._all.discard(connection)
        if i is None:
            return
        if unread and i not in self._resent and not self._done.is_set():
            self._resent.add(i)
            self._send_again(i)
        else:
            self.ended(i, 0, b"", "connection lost")

    async def _show_progress(self) -> None:
        """Update a line each second on a terminal; print a line per interval otherwise."""
        terminal = sys.stderr.isatty()
        while True:
            await asyncio.sleep(1 if terminal else progress.INTERVAL_S)
            outstanding = self._next - self._ended
            line = f"{self._next} of {len(self._requests)} sent, {outstanding} outstanding"
            if terminal:
                print(f"\r{line}  ", end="\r", file=sys.stderr, flush=True)
            else:
                progress.report(line)


class _Connection(asyncio.Protocol):
    """A keep-alive connection that carries one request at a time."""

    def __init__(self, sender: _Sender) -> None:
        self._sender = sender
        self._request: int | None = None  # the outstanding one
        self.used = False
        self._buffer = bytearray()
        self._total = 0  # bytes of the response; 0: not known yet
        self._status, self._head = 0, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._sender.free(self)

    @property
    def usable(self) -> bool:
        return not self._transport.is_closing()

    def send(self, i: int, request: bytes) -> None:
        self._request = i
        self._transport.write(request)

    def close(self) -> None:
        self._request = None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        if self._request is None:  # unsolicited
            self.close()
            return
        if not self._total:
            end = buffer.find(_HEAD_END)
            if end < 0:
                return
            head = bytes(buffer[:end])
            length = _LENGTH.search(head)
            if length is None or not head[9:12].isdigit():
                i, self._request = self._request, None
                self._sender.ended(i, 0, b"", "answer without Content-Length")
                self.close()
                return
            self._status, self._head = int(head[9:12]), end + len(_HEAD_END)
            self._total = self._head + int(length[1])
        if len(buffer) >= self._total:
            i, self._request, self.used = self._request, None, True
            body = bytes(buffer[self._head : self._total])
            buffer.clear()
            self._total = 0
            self._sender.ended(i, self._status, body)
            self._sender.free(self)

    def connection_lost(self, error: Exception | None) -> None:
        i, self._request = self._request, None
        self._sender.lost(self, i, self.used and not self._buffer)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable Python's cyclic garbage collector, whose pauses take milliseconds."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
