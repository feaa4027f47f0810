"""Read a request's body within a limit, and stop the work for clients that disconnect."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from pcae_serve.errors import TooLarge

T = TypeVar("T")


async def limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """Yield the body's chunks. Raises TooLarge above `limit` bytes, announced or received."""
    too_large = TooLarge(f"the body is over the limit of {limit:,} bytes; send a smaller image")
    announced = request.headers.get("content-length", "0")
    if announced.isascii() and announced.isdecimal() and int(announced[:20]) > limit:
        raise too_large
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        yield chunk


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`; if the client disconnects first, cancel it and raise ClientDisconnect.

    For requests whose body has been read: until then, its reader raises ClientDisconnect.
    """

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, disconnected = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({answer, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        disconnected.cancel()
        if not answer.done():  # the client left, or the server cancels this request
            answer.cancel()
            await asyncio.wait({answer})  # it has ended before this returns
