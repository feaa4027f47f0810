"""The sender: requests leave at their times, whatever became of earlier ones (open loop).

    (due, bytes) of every request -> plain HTTP/1.1 on connections opened beforehand -> Sent

One asyncio loop on one core. Requests are built before, answers are read after; in between there is
only sending and taking times. It knows bytes and a clock, nothing of images, budgets or tiers.
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

#: asyncio's timers come up to a millisecond late; for the rest, the loop turns without sleeping,
#: and takes answers as it turns.
SPIN_S = 1.5e-3
#: Sent in one turn of the loop, where many are due; then answers are taken.
BURST = 8
#: Connections opened at the same time, and those kept free while requests are being sent.
OPENING, FREE = 32, 4
#: Files that this process may need for other things.
OTHER_FILES = 64
#: From the first connection to the first request.
LEAD_S = 0.1

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_HEAD_END = b"\r\n\r\n"


@dataclass
class Sent:
    """Of n requests; seconds since the first was due, NaN where it did not come to it."""

    sent_s: NDArray[np.float64]  # [n]
    ended_s: NDArray[np.float64]  # [n]
    status: NDArray[np.int16]  # [n]; 0: no whole answer
    bodies: list[bytes]
    faults: Counter[str] = field(default_factory=Counter)  # why there was none

    @classmethod
    def none_of(cls, n: int) -> "Sent":
        return cls(np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, np.int16), [b""] * n)


def send(
    host: str,
    port: int,
    requests: Sequence[bytes],
    due_s: Sequence[float],
    connections: int,
    patience_s: float,
) -> Sent:
    """Send every request when it is due; wait `patience_s` at most for answers after the last.

    due_s: rising. connections: opened beforehand; more follow where these do not do. Raises
    StartError where nobody listens.
    """
    return asyncio.run(_Sender(host, port, requests, due_s).run(connections, patience_s))


class _Sender:
    def __init__(
        self, host: str, port: int, requests: Sequence[bytes], due_s: Sequence[float]
    ) -> None:
        self._host, self._port = host, port
        self._requests, self._due_s = requests, due_s
        self.sent = Sent.none_of(len(requests))
        self._next = self._ended = 0  # of the requests
        self._zero_s = 0.0
        self._idle: list[_Connection] = []  # the last used on top: those below may be closed
        self._all: set[_Connection] = set()
        self._without: deque[int] = deque()  # due, and no connection is free
        self._again: set[int] = set()  # sent twice already
        self._opening: set[asyncio.Task[None]] = set()

    async def run(self, connections: int, patience_s: float) -> Sent:
        self._loop, self._done = asyncio.get_running_loop(), asyncio.Event()
        self._most = max(1, raise_descriptor_limit() - OTHER_FILES)
        try:
            await self._find()
            wanted = min(connections, self._most)
            while (missing := wanted - len(self._all)) > 0:
                await asyncio.gather(*(self._connect() for _ in range(min(OPENING, missing))))
        except OSError as error:
            raise StartError(
                f"cannot connect to {self._host}:{self._port}: {one_line(error)}"
            ) from None
        with _undisturbed():
            self._zero_s = self._loop.time() + LEAD_S
            ticker = self._loop.create_task(self._tell()) if sys.stderr.isatty() else None
            self._turn()
            end_s = self._zero_s + self._due_s[-1] + patience_s
            with suppress(TimeoutError):
                async with asyncio.timeout_at(end_s):
                    await self._done.wait()
        if ticker is not None:
            ticker.cancel()
        self.sent.faults["no answer"] += len(self._requests) - self._ended
        for task in self._opening:
            task.cancel()
        for connection in list(self._all):
            connection.close()
        await asyncio.sleep(0)  # closed for good
        return self.sent

    def now_s(self) -> float:
        return self._loop.time() - self._zero_s

    def _turn(self) -> None:
        """Send what is due, and come back when the next is."""
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
            self._loop.call_later(wait_s - SPIN_S, self._turn)
        else:
            self._loop.call_soon(self._turn)

    def _send(self, i: int) -> None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                connection.send(i, self._requests[i])
                self.sent.sent_s[i] = self.now_s()
                break
        else:
            self._without.append(i)
        if len(self._idle) < FREE:
            self._open_more()

    def _open_more(self) -> None:
        room = self._most - len(self._all) - len(self._opening)
        for _ in range(min(room, FREE + len(self._without) - len(self._opening))):
            task = self._loop.create_task(self._try_connect())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _find(self) -> None:
        """The first address behind the name that listens, so that no name is looked up later."""
        found = await self._loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
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
            self.sent.faults["cannot connect"] += 1
            if not self._all and self._without:  # nothing else would take it
                self.ended(self._without.popleft(), 0, b"", one_line(error))

    def free(self, connection: "_Connection") -> None:
        """It is there for the next one."""
        self._all.add(connection)
        self._idle.append(connection)
        if self._without:
            self._send(self._without.popleft())

    def ended(self, i: int, status: int, body: bytes, fault: str = "") -> None:
        sent = self.sent
        sent.ended_s[i], sent.status[i], sent.bodies[i] = self.now_s(), status, body
        if fault:
            sent.faults[fault] += 1
        self._ended += 1
        if self._ended == len(self._requests):
            self._done.set()

    def lost(self, connection: "_Connection", i: int | None, untouched: bool) -> None:
        """It is closed. i: in hand; untouched: the server had closed it before reading that one."""
        self._all.discard(connection)
        if i is None:
            return
        if untouched and i not in self._again and not self._done.is_set():
            self._again.add(i)  # as every client does on a kept connection; its time goes on
            self._send(i)
        else:
            self.ended(i, 0, b"", "connection lost")

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(1)
            print(
                f"\r{self._next}/{len(self._requests)} sent, {self._next - self._ended} in hand  ",
                end="\r",
                file=sys.stderr,
                flush=True,
            )


class _Connection(asyncio.Protocol):
    """One request at a time, on a connection that is kept."""

    def __init__(self, sender: _Sender) -> None:
        self._sender = sender
        self._in_hand: int | None = None
        self._used = False
        self._buffer = bytearray()
        self._whole = 0  # bytes of the answer; 0: not known yet
        self._status, self._head = 0, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._sender.free(self)

    @property
    def usable(self) -> bool:
        return not self._transport.is_closing()

    def send(self, i: int, request: bytes) -> None:
        self._in_hand = i
        self._transport.write(request)

    def close(self) -> None:
        self._in_hand = None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        if self._in_hand is None:  # nobody asked
            self.close()
            return
        if not self._whole:
            end = buffer.find(_HEAD_END)
            if end < 0:
                return
            head = bytes(buffer[:end])
            length = _LENGTH.search(head)
            if length is None or not head[9:12].isdigit():
                i, self._in_hand = self._in_hand, None
                self._sender.ended(i, 0, b"", "answer without Content-Length")
                self.close()
                return
            self._status, self._head = int(head[9:12]), end + len(_HEAD_END)
            self._whole = self._head + int(length[1])
        if len(buffer) >= self._whole:
            i, self._in_hand, self._used = self._in_hand, None, True
            body = bytes(buffer[self._head : self._whole])
            buffer.clear()
            self._whole = 0
            self._sender.ended(i, self._status, body)
            self._sender.free(self)

    def connection_lost(self, error: Exception | None) -> None:
        i, self._in_hand = self._in_hand, None
        self._sender.lost(self, i, self._used and not self._buffer)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without Python's garbage collection: it stops everything for milliseconds."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
