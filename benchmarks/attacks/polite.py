"""A polite client, and a probe of /livez, both at fixed times whatever the answers do."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qs

from benchmarks.attacks.base import Target, connect, post

LIVEZ_EVERY_S = 0.25
GIVE_UP_S = 30.0

#: What went wrong if there was no answer.
FAILURES = (OSError, EOFError, TimeoutError, ValueError)


@dataclass
class Seen:
    """What the answers were and when they came."""

    statuses: Counter[str] = field(default_factory=Counter)  # or the name of an error
    seconds: list[float] = field(default_factory=list)  # of every request, failed ones included
    in_time: int = 0

    @property
    def attainment(self) -> float:
        return self.in_time / max(1, len(self.seconds))

    def percentile_ms(self, share: float) -> float:
        """Return a percentile of the times: share 1 for the largest."""
        ordered = sorted(self.seconds)
        return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


async def ask_politely(
    target: Target, query: str, image: bytes, rate: float, seconds: float
) -> Seen:
    """Send `rate` requests per second for some seconds, and return what became of them."""
    budget_s = float(parse_qs(query)["budget_ms"][0]) / 1e3

    async def ask() -> int:
        return await post(target, f"/classify?{query}", image, "image/png")

    return await _at_fixed_times(ask, 1 / rate, seconds, budget_s, budget_s + 5)


async def probe_livez(target: Target, seconds: float) -> Seen:
    """Ask for /livez four times a second; more than 1 s is late."""

    async def ask() -> int:
        async with connect(target) as connection:
            await connection.send(target.head("GET /livez", "Connection: close"))
            return (await connection.answer()).status

    return await _at_fixed_times(ask, LIVEZ_EVERY_S, seconds, 1.0, GIVE_UP_S)


async def measure_capacity(target: Target, query: str, image: bytes, seconds: float) -> float:
    """Return the answers per second that 8 clients get, each asking again at once."""
    statuses: Counter[int] = Counter()
    end_s = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < end_s:
            statuses[await post(target, f"/classify?{query}", image, "image/png")] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(client())
    return statuses[200] / seconds


async def time_to_recover(target: Target, query: str, image: bytes, limit_s: float) -> float:
    """Return the seconds until three polite requests in a row are answered in time."""
    begin_s, good = time.monotonic(), 0
    while good < 3 and time.monotonic() - begin_s < limit_s:
        good = good + 1 if (await ask_politely(target, query, image, 10, 0.05)).in_time else 0
    return time.monotonic() - begin_s


async def _at_fixed_times(
    ask: Callable[[], Awaitable[int]],
    every_s: float,
    seconds: float,
    in_time_s: float,
    give_up_s: float,
) -> Seen:
    seen = Seen()

    async def one(due_s: float) -> None:
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        begin_s = time.monotonic()
        try:
            status = str(await asyncio.wait_for(ask(), give_up_s))
        except FAILURES as error:
            status = type(error).__name__
        took_s = time.monotonic() - begin_s
        seen.statuses[status] += 1
        seen.seconds.append(took_s)
        seen.in_time += status == "200" and took_s <= in_time_s

    start_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(max(1, int(seconds / every_s))):
            group.create_task(one(start_s + number * every_s))
    return seen
