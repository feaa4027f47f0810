"""Valid requests that leave nothing to others: pinned to the expensive tier, or very many."""

from functools import cached_property
from pathlib import Path

from benchmarks.attacks.base import Attack, Target, connect, post, repeat

SAMPLE = Path(__file__).parents[2] / "pcae_serve" / "sample.png"


class PinnedToFull(Attack):
    name = "pinned"
    about = "3 clients, tier=full, 5 s, one request after the other; polite: tier=fast, 1 s"
    polite = "budget_ms=1000&tier=fast"
    clients = 3

    async def run(self, target: Target) -> None:
        image = SAMPLE.read_bytes()
        head = target.head(
            "POST /classify?budget_ms=5000&tier=full", f"Content-Length: {len(image)}"
        )

        async def client() -> None:
            async with connect(target) as connection:
                while True:
                    await connection.send(head + image)
                    await connection.answer()

        await repeat(self.clients, client)


class TwoPinnedToFull(PinnedToFull):
    name = "pinned-balanced"
    about = "2 clients, tier=full, 5 s, one request after the other; polite: tier=balanced, 3 s"
    polite = "budget_ms=3000&tier=balanced"
    clients = 2


class GreedyBatches(Attack):
    name = "greedy-batches"
    about = "another API key: 10 connections with batches of 64 images, budget 5 s"
    needs_keys = True

    @cached_property
    def body(self) -> bytes:
        image = SAMPLE.read_bytes()
        part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        return (part + image + b"\r\n") * 64 + b"--x--\r\n"

    async def run(self, target: Target) -> None:
        body = self.body

        async def client() -> None:
            kind = "multipart/form-data; boundary=x"
            await post(target, "/classify/batch?budget_ms=5000", body, kind)

        await repeat(10, client)


class GreedySingles(Attack):
    name = "greedy-singles"
    about = "another API key: 100 connections with single images, budget 5 s, one after the other"
    needs_keys = True

    async def run(self, target: Target) -> None:
        image = SAMPLE.read_bytes()

        async def client() -> None:
            await post(target, "/classify?budget_ms=5000", image)

        await repeat(100, client)
