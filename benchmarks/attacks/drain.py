"""Clients that keep their connections, and a server that is stopped: how many requests are lost.

A request is lost if it is sent on a connection that has carried an answer, and no answer comes. A
refusal is an answer, and a new connection that is not accepted loses nothing that was promised.
"""

import asyncio
import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.attacks.base import Connection, Target, connect
from benchmarks.attacks.measurement import ROOT, Options
from benchmarks.attacks.server import serving

CLIENTS = 24
LOST, NOT_ACCEPTED = "lost", "not accepted"


def measure_drain(options: Options, seconds: float = 2.0) -> Counter[str]:
    """Return how many requests had which status, or were LOST or NOT_ACCEPTED, around a SIGTERM."""
    with (
        tempfile.TemporaryDirectory() as name,
        serving(
            options.source,
            Path(name),
            ("--profile-s", "2"),
            core=options.server_core,
            descriptors=None,
        ) as server,
    ):
        return asyncio.run(_drain(Target(server.port), seconds, server.process.terminate))


async def _drain(target: Target, seconds: float, stop: Callable[[], None]) -> Counter[str]:
    image = (ROOT / "pcae_serve" / "sample.png").read_bytes()
    head = target.head("POST /classify?budget_ms=5000", f"Content-Length: {len(image)}")
    seen: Counter[str] = Counter()

    async def client() -> None:
        with contextlib.suppress(OSError):  # the server does not listen any more
            while True:
                async with connect(target) as connection:
                    await _ask(connection, head + image, seen)

    async def terminate() -> None:
        await asyncio.sleep(seconds)
        stop()

    async with asyncio.TaskGroup() as group:
        group.create_task(terminate())
        for _ in range(CLIENTS):
            group.create_task(client())
    return seen


async def _ask(connection: Connection, request: bytes, seen: Counter[str]) -> None:
    """Send requests until the server announces that it closes the connection, or does so."""
    answered = 0
    while True:
        try:
            await connection.send(request)
            answer = await connection.answer()
        except (OSError, EOFError):
            seen[LOST if answered else NOT_ACCEPTED] += 1
            return
        seen[str(answer.status)] += 1
        answered += 1
        if answer.fields.get("connection", "").lower() == "close":
            return
