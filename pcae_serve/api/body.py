"""Read a request's body within a limit, and stop the work for clients that disconnect."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import suppress
from io import BytesIO
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from pcae_serve.errors import RequestError, TooLarge
from pcae_serve.runtime.uploads import Upload

T = TypeVar("T")


def announced_bytes(request: Request) -> int:
    """Return the length of the body by its header, 0 if there is none."""
    announced = request.headers.get("content-length", "0")
    return int(announced[:20]) if announced.isascii() and announced.isdecimal() else 0


async def limited(request: Request, limit: int, upload: Upload) -> AsyncGenerator[bytes, None]:
    """Yield the body's chunks, counted in `upload`.

    Raises TooLarge above `limit` bytes, announced or received.
    """
    too_large = TooLarge(f"the body is over the limit of {limit:,} bytes; send a smaller image")
    if announced_bytes(request) > limit:
        raise too_large
    async for chunk in request.stream():
        upload.add(len(chunk))
        if upload.received_bytes > limit:
            raise too_large
        yield chunk


async def read_body(request: Request, limit: int, upload: Upload) -> bytes:
    """Return the whole body. Raises TooLarge above `limit` bytes."""
    # one growing buffer: a list of chunks takes twice the memory when it is joined
    with BytesIO() as buffer:
        async for chunk in limited(request, limit, upload):
            buffer.write(chunk)
        return buffer.getvalue()


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`; if the client disconnects first, cancel it and raise ClientDisconnect.

    For requests whose body has been read: until then, its reader raises ClientDisconnect.
    """

    async def end_on_disconnect(scope: asyncio.Timeout) -> None:
        with suppress(RequestError):  # what follows the body is not valid HTTP
            while (await request.receive())["type"] != "http.disconnect":
                pass
        scope.reschedule(asyncio.get_running_loop().time())

    watch: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(None) as scope:  # without a time: only a disconnect ends it
            watch = asyncio.create_task(end_on_disconnect(scope))
            return await work
    except TimeoutError:
        if not scope.expired():  # the work's own
            raise
        raise ClientDisconnect from None
    finally:
        if watch is not None:
            watch.cancel()
