"""What an attack is, and a connection to attack with."""

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, ClassVar, NamedTuple

#: Seconds that an attacker pauses after an answer or a refusal, so that it is not a plain flood.
PAUSE_S = 0.02

#: How often each status was answered in this process.
ANSWERS: Counter[int] = Counter()


class Target(NamedTuple):
    """The server to attack."""

    port: int
    key: str | None = None  # the attacker's own API key

    def head(self, request: str, *fields: str) -> bytes:
        """Return the head of a request, such as `POST /classify`, with these header fields."""
        key = [] if self.key is None else [f"Authorization: Bearer {self.key}"]
        lines = [f"{request} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", *key, *fields, "", ""]
        return "\r\n".join(lines).encode()


class Connection(NamedTuple):
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, content: bytes) -> None:
        self.writer.write(content)
        await self.writer.drain()

    async def answer(self) -> "Answer":
        """Read the next answer, its body included. Raises OSError or EOFError."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(": ") for line in lines[1:])
        fields = {name.lower(): value for name, _, value in pairs}
        await self.reader.readexactly(int(fields.get("content-length", 0)))
        status = int(lines[0].split()[1])
        ANSWERS[status] += 1
        return Answer(status, fields)


class Answer(NamedTuple):
    status: int
    fields: dict[str, str]  # of the head, by lower-case name


@contextlib.asynccontextmanager
async def connect(target: Target) -> AsyncIterator[Connection]:
    """Open a connection, and close it at once in the end. Raises OSError."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


class Attack(ABC):
    """One way to spoil the service for others."""

    name: ClassVar[str]
    about: ClassVar[str]  # one line
    flags: ClassVar[Sequence[str]] = ()  # of the server
    descriptors: ClassVar[int | None] = None  # the server's limit of open files
    polite: ClassVar[str] = "budget_ms=1000"  # query of the polite client, budget_ms included
    needs_keys: ClassVar[bool] = False  # attacker and polite client are told apart by keys

    @abstractmethod
    async def run(self, target: Target) -> None:
        """Attack until cancelled."""


async def repeat(times: int, client: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `times` copies of a client, each again whenever it ends or its connection breaks."""

    async def forever() -> None:
        while True:
            with contextlib.suppress(OSError, EOFError, asyncio.LimitOverrunError, ValueError):
                await client()
            await asyncio.sleep(PAUSE_S)

    async with asyncio.TaskGroup() as group:
        for _ in range(times):
            group.create_task(forever())


async def post(target: Target, path: str, body: bytes, kind: str = "image/jpeg") -> int:
    """Send a body on a connection of its own and return the status. Raises OSError or EOFError."""
    fields = (f"Content-Length: {len(body)}", f"Content-Type: {kind}")
    async with connect(target) as connection:
        await connection.send(target.head(f"POST {path}", *fields) + body)
        return (await connection.answer()).status
