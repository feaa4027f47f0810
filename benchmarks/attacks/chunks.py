"""A body in chunks of one byte: six bytes on the wire, and one turn of the parser, for each."""

from benchmarks.attacks.base import Attack, Target, connect, repeat

BLOCK = b"1\r\na\r\n" * 2700  # 16 kB, what the server reads at once


class OneByteChunks(Attack):
    name = "chunks"
    about = "50 connections, bodies in chunks of one byte, as fast as they are taken"

    async def run(self, target: Target) -> None:
        head = target.head("POST /classify?budget_ms=60000", "Transfer-Encoding: chunked")

        async def client() -> None:
            async with connect(target) as connection:
                await connection.send(head)
                while not connection.reader.at_eof():
                    await connection.send(BLOCK)

        await repeat(50, client)
