"""Run `pcae-serve classify --url`: send images to a server, several at a time."""

import asyncio
import sys
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from pcae_serve.client import AsyncClient
from pcae_serve.commands.classify import STDIN, Classify
from pcae_serve.errors import PcaeError
from pcae_serve.local.run_output import RunOutput
from pcae_serve.schemas import Classification

#: Images in flight at the same time.
MAX_IN_FLIGHT = 8
#: Images whose answers are awaited or kept until those before them are there.
MAX_WAITING = 1024


def classify_on_server(
    options: Classify, client: AsyncClient, names: Sequence[str], output: RunOutput
) -> None:
    """Classify images, and pass on what became of them, in their order."""
    # not in a thread: one that waits for a terminal would outlive Ctrl-C
    stdin = sys.stdin.buffer.read() if STDIN in names else b""
    asyncio.run(_classify(options, client, names, stdin, output))


async def _classify(
    options: Classify, client: AsyncClient, names: Sequence[str], stdin: bytes, output: RunOutput
) -> None:
    slots, rest = asyncio.Semaphore(MAX_IN_FLIGHT), iter(names)
    waiting = deque[tuple[str, asyncio.Task[tuple[Classification, float] | Exception]]]()
    async with client:
        try:
            while True:
                for name in islice(rest, MAX_WAITING - len(waiting)):
                    one = _classify_one(options, client, slots, name, stdin)
                    waiting.append((name, asyncio.create_task(one)))
                if not waiting:
                    return
                name, task = waiting[0]
                result = await task
                waiting.popleft()
                if isinstance(result, Exception):
                    output.failed(name, result)
                else:
                    output.answered(name, *result)
        finally:  # interrupted, or the reader left: end the tasks before the client is closed
            for _, task in waiting:
                task.cancel()
            await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)


async def _classify_one(
    options: Classify, client: AsyncClient, slots: asyncio.Semaphore, name: str, stdin: bytes
) -> tuple[Classification, float] | Exception:
    """Return the answer and the milliseconds it took, or the error."""
    async with slots:
        start_s = time.perf_counter()
        try:
            answer = await client.classify(
                stdin if name == STDIN else Path(name),
                tier=options.tier,
                budget_ms=options.budget_ms,
                min_tier=options.min_tier,
                top_k=options.top_k,
            )
        except (PcaeError, OSError) as error:
            return error
        return answer, (time.perf_counter() - start_s) * 1e3
