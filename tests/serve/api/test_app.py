"""The application: its start, and clients that leave."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi.testclient import TestClient

from pcae_serve.api.app import create_app
from pcae_serve.bundle.reader import Bundle
from pcae_serve.runtime.service import Service
from tests.support.apps import MakeSettings, fail, wait_until
from tests.support.gate import Gate
from tests.support.images import image_bytes


def test_a_failed_start_is_reported(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    gate.fails = True
    failures: list[BaseException] = []
    with TestClient(create_app(Service(settings(), small_bundle, [gate]), failures.append)):
        wait_until(lambda: bool(failures))
    assert "out of memory" in str(failures[0])


async def asgi(app: Any, body: bytes, receive: Callable[[], Awaitable[Any]]) -> list[Any]:
    """One POST /classify as the server would make it; what the application sends back."""
    sent: list[Any] = []
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Any:
        return messages.pop() if messages else await receive()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/classify", "raw_path": b"/classify",
        "query_string": b"budget_ms=60000", "headers": [], "http_version": "1.1",
        "scheme": "http", "server": ("test", 80), "client": ("test", 1), "asgi": {"version": "3.0"},
    }  # fmt: skip
    await app(scope, next_message, send)
    return sent


def test_a_client_that_leaves_while_it_waits_is_never_computed(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    async def scenario() -> None:
        service = Service(settings(), small_bundle, [gate])
        await service.start()
        app = create_app(service, fail)
        gate.shut()

        async def stays() -> Any:
            await asyncio.Event().wait()

        async def leaves() -> Any:
            return {"type": "http.disconnect"}

        first = asyncio.create_task(asgi(app, image_bytes(), stays))
        await asyncio.to_thread(gate.entered.wait, 20)
        left = await asgi(app, image_bytes(), leaves)
        assert left[0]["status"] == 499
        gate.open.set()
        assert (await first)[0]["status"] == 200
        await service.stop()

    asyncio.run(scenario())
    assert gate.batches == [1]
