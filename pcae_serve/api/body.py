"""A request's body: no more of it is read than may be, and nobody works for a client that left.

It knows bytes and connections, nothing of what is in them.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from pcae_serve.errors import TooLarge

T = TypeVar("T")
Body = TypeVar("Body")


async def limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body's chunks; TooLarge where they come to more than `limit`, whatever was announced."""
    too_large = TooLarge(f"the body is over the limit of {limit:,} bytes: send a smaller image")
    announced = request.headers.get("content-length", "0")
    if announced.isascii() and announced.isdecimal() and int(announced[:20]) > limit:
        raise too_large
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        yield chunk


async def unless_left(
    request: Request,
    run: Callable[[Callable[[], Awaitable[Body]]], Coroutine[Any, Any, T]],
    read: Callable[[], Awaitable[Body]],
) -> T:
    """Wait for what `run` makes of the body; where the client leaves first, cancel it.

    `run` calls `read`, at most once, for the body; nobody would read the answer of one who left.
    """
    body_read = asyncio.Event()

    async def read_and_tell() -> Body:
        try:
            return await read()
        finally:
            body_read.set()

    async def left() -> None:
        await body_read.wait()  # until then the body's reader is told, and raises ClientDisconnect
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, disconnected = asyncio.create_task(run(read_and_tell)), asyncio.create_task(left())
    both: set[asyncio.Task[Any]] = {answer, disconnected}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        for task in both:
            task.cancel()
