"""Bodies that never arrive, arrive slowly, or arrive all at once."""

import asyncio
import contextlib
from functools import cached_property

from benchmarks.attacks.base import Attack, Connection, Target, connect, post, repeat
from benchmarks.attacks.decodes import LargePhotos


class IdleUploads(Attack):
    name = "idle-uploads"
    about = "260 connections that send the head of an upload, budget 1 h, and no body"
    connections = 260

    async def run(self, target: Target) -> None:
        head = target.head("POST /classify?budget_ms=60000", "Content-Length: 100000")

        async def client() -> None:
            async with connect(target) as connection:
                await connection.send(head)
                await self.carry_on(connection)

        await repeat(self.connections, client)

    async def carry_on(self, connection: Connection) -> None:
        """Wait until the server gives up."""
        await connection.answer()


class SlowUploads(IdleUploads):
    name = "slow-uploads"
    about = "260 connections that send 20 bytes of a body each second"

    async def carry_on(self, connection: Connection) -> None:
        async def drip() -> None:
            while True:
                await connection.send(bytes(20))
                await asyncio.sleep(1)

        dripping = asyncio.create_task(drip())
        try:
            await connection.answer()
        finally:
            dripping.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await dripping


class UploadBursts(Attack):
    name = "bursts"
    about = "50 connections, each sending bodies of 19.9 MB as fast as they are taken"

    @cached_property
    def body(self) -> bytes:
        photo = LargePhotos().build()[:1_000_000]  # cut short: its header is valid
        return photo + bytes(19_900_000 - len(photo))

    async def run(self, target: Target) -> None:
        body = self.body

        async def client() -> None:
            await post(target, "/classify?budget_ms=60000", body)

        await repeat(50, client)
