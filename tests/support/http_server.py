"""A small ASGI application behind the server's own connections, on a real socket and a thread."""

import asyncio
import json
import re
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from pcae_serve.api.connection import Connection, RaiseBodyErrors
from pcae_serve.api.connection_limit import ConnectionLimit, RefuseSurplus
from pcae_serve.api.problems import refusal
from pcae_serve.errors import RequestError

#: A request after which the server closes the connection, so that its answer ends with it.
#: Limit of a body, in bytes.
MAX_BODY_BYTES = 50_000_000
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Read the body; answer with what the request said. /early answers before the body is read."""
    body, more = b"", scope["path"] != "/early"
    try:
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
    except RequestError as error:
        await refusal(error, scope)(scope, receive, send)
        return
    headers = [
        (name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]
    ]
    told = {name: scope[name] for name in ("method", "path", "http_version")}
    told |= {"headers": headers, "query": scope["query_string"].decode(), "body": len(body)}
    content = json.dumps(told).encode()
    start = [(b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": start})
    await send({"type": "http.response.body", "body": content})


class Held:
    """An application that notes each request, and answers it once `open` is set."""

    def __init__(self) -> None:
        self.entered, self.open, self.gone = threading.Event(), threading.Event(), threading.Event()
        self.requests = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.requests += 1
        self.entered.set()
        disconnected = asyncio.ensure_future(self.disconnected(receive))
        while not self.open.is_set() and not disconnected.done():
            await asyncio.sleep(0.005)
        if disconnected.done():
            self.gone.set()
            return
        disconnected.cancel()
        headers = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    @staticmethod
    async def disconnected(receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


class HttpServer:
    """The server's loop and connections, for tests on the outside of the socket."""

    def __init__(self, port: int, loop: asyncio.AbstractEventLoop, state: ServerState) -> None:
        self.port, self.loop, self.state = port, loop, state

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def exchange(self, *parts: bytes) -> bytes:
        """Send each part by itself; return all that comes back until the server closes."""
        with self.connect() as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for part in parts:
                try:
                    client.sendall(part)
                except OSError:  # the server has closed
                    break
            return read_all(client)

    def run(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Run a coroutine on the server's loop."""

        async def awaited() -> Any:
            return await call()

        return asyncio.run_coroutine_threadsafe(awaited(), self.loop).result(60)


@contextmanager
def http_server(app: Any = echo, limit: ConnectionLimit | None = None) -> Iterator[HttpServer]:
    """Serve `app` until the end."""
    limit = limit or ConnectionLimit(1000)
    started, stop = threading.Event(), asyncio.Event()
    servers: list[HttpServer] = []

    async def serve() -> None:
        state = ServerState()
        config = uvicorn.Config(
            RefuseSurplus(RaiseBodyErrors(app)), ws="none", log_config=None, access_log=False
        )
        config.load()
        loop = asyncio.get_running_loop()
        make = partial(Connection, config, state, {}, limit=limit, max_body_bytes=MAX_BODY_BYTES)
        listener = await loop.create_server(make, "127.0.0.1", 0)
        servers.append(HttpServer(listener.sockets[0].getsockname()[1], loop, state))
        started.set()
        await stop.wait()
        listener.close()
        for connection in list(state.connections):
            connection.transport.abort()
        for task in list(state.tasks):
            task.cancel()
        await asyncio.gather(*state.tasks, return_exceptions=True)
        while state.connections:
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(60)
    try:
        yield servers[0]
    finally:
        servers[0].loop.call_soon_threadsafe(stop.set)
        thread.join(60)


def read_all(client: socket.socket) -> bytes:
    """Return what comes back until the server closes."""
    received = b""
    try:
        while part := client.recv(65_536):
            received += part
    except ConnectionResetError:
        received += b"(reset)"
    return received


def statuses(received: bytes) -> list[int]:
    """Return the status of each answer."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def bodies(received: bytes) -> list[Any]:
    """Return the JSON body of each answer."""
    found = re.findall(rb"content-length: (\d+)\r\n(?:[^\r]+\r\n)*\r\n", received, re.IGNORECASE)
    ends = [m.end() for m in re.finditer(rb"\r\n\r\n(?=\{)", received)]
    return [
        json.loads(received[end : end + int(length)])
        for end, length in zip(ends, found, strict=True)
    ]
