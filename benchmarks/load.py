"""Open-loop load on a server that runs on this machine: what was answered, on which tier, how late.

    pcae-serve --port 8055 &
    python benchmarks/load.py http://127.0.0.1:8055 [--rate 80] [--seconds 5] [--budget-ms 100]

Requests leave at Poisson times whatever happens to earlier ones. Lateness is the server's own word
(`met_budget`); the client shares the machine with the server.
"""

import argparse
import asyncio
import random
from collections import Counter
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import httpx2

SAMPLE = Path(__file__).parent.parent / "docs" / "samples" / "bag.png"
MOST_CONNECTIONS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--rate", type=float, default=80, help="requests a second")
    parser.add_argument("--seconds", type=float, default=5, help="at most 60")
    parser.add_argument("--budget-ms", type=float, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if urlsplit(options.url).hostname not in ("127.0.0.1", "localhost", "::1"):
        parser.error("the server must be on this machine")
    count = round(options.rate * min(options.seconds, 60))
    print(asyncio.run(load(options.url, options.rate, count, options.budget_ms, options.seed)))


async def load(url: str, rate: float, count: int, budget_ms: float, seed: int) -> str:
    """Send `count` requests and say in one line what became of them."""
    draw, body = random.Random(seed), SAMPLE.read_bytes()
    statuses, tiers = Counter[int](), Counter[str]()
    totals_ms, late = list[float](), 0
    limits = httpx2.Limits(max_connections=MOST_CONNECTIONS)
    async with httpx2.AsyncClient(timeout=30, limits=limits) as client:

        async def ask() -> None:
            nonlocal late
            response = await client.post(f"{url}/classify?budget_ms={budget_ms}", content=body)
            statuses[response.status_code] += 1
            if response.status_code == 200:
                answer = response.json()
                tiers[answer["tier"]] += 1
                late += not answer["met_budget"]
                totals_ms.append(answer["timings_ms"]["total"])

        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(ask())
                await asyncio.sleep(draw.expovariate(rate))
    typical = f"{median(totals_ms):.1f}" if totals_ms else "-"
    return (
        f"{rate:g}/s, {count} requests, budget {budget_ms:g} ms: statuses {dict(statuses)},"
        f" tiers {dict(tiers)}, {late} late, median total {typical} ms"
    )


if __name__ == "__main__":
    main()
