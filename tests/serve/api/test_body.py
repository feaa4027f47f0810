"""Work on a request ends with its client."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from pcae_serve.api.body import unless_disconnected


def request(receive: Callable[[], Awaitable[dict[str, Any]]]) -> Request:
    return Request({"type": "http", "method": "POST", "headers": []}, receive)


class Work:
    """Runs until it is cancelled; then its clean-up takes one more turn of the loop."""

    def __init__(self) -> None:
        self.started, self.cleaned_up = asyncio.Event(), False

    async def run(self) -> None:
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.cleaned_up = True


def test_the_result_is_returned_and_nothing_is_left_running() -> None:
    async def never() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def scenario() -> None:
        assert await unless_disconnected(request(never), asyncio.sleep(0, 7)) == 7
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_a_disconnect_cancels_the_work_and_waits_for_its_end() -> None:
    async def scenario() -> None:
        work = Work()

        async def receive() -> dict[str, Any]:
            await work.started.wait()
            return {"type": "http.disconnect"}

        with pytest.raises(ClientDisconnect):
            await unless_disconnected(request(receive), work.run())
        assert work.cleaned_up

    asyncio.run(scenario())


def test_cancelling_the_request_cancels_the_work_and_waits_for_its_end() -> None:
    async def scenario() -> None:
        work = Work()

        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

        call = asyncio.create_task(unless_disconnected(request(receive), work.run()))
        await work.started.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert work.cleaned_up

    asyncio.run(scenario())
