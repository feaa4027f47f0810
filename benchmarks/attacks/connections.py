"""Connections that stay open and ask for nothing."""

import asyncio

from benchmarks.attacks.base import Attack, Target, connect, repeat


class Descriptors(Attack):
    name = "descriptors"
    about = "1,000 idle connections to a server that may open 256 files"
    descriptors = 256

    async def run(self, target: Target) -> None:
        async def client() -> None:
            async with connect(target) as connection:
                await connection.reader.read()  # until the server closes it
                await asyncio.sleep(0.5)

        await repeat(1000, client)
