"""Run one attack in this process: python -m benchmarks.attacks.attacker NAME PORT [KEY].

Prints a line when it begins, attacks until its standard input ends, and prints how often it got
which status.
"""

import asyncio
import contextlib
import json
import os
import resource
import sys

from benchmarks.attacks.base import ANSWERS, Target
from benchmarks.attacks.registry import ATTACKS


async def attack(name: str, target: Target) -> None:
    """Attack until the harness closes the pipe or ends."""
    loop = asyncio.get_running_loop()
    chosen = ATTACKS[name]()
    getattr(chosen, "body", None)  # builds what it sends
    running = asyncio.create_task(chosen.run(target))
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    print(json.dumps(ANSWERS), flush=True)


if __name__ == "__main__":
    os.nice(10)  # the polite client goes first: it is not to measure a lack of CPU
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    asyncio.run(attack(sys.argv[1], Target(int(sys.argv[2]), *sys.argv[3:4])))
