"""A device as the server sees it: a thread that does one thing at a time, and may never come back.

A call into a GPU's driver or a native library cannot be killed from outside. A thread that is lost
in one is given up: the rest of the process goes on without it, and ends without waiting for it. It
knows threads, nothing of engines or requests.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Device:
    """One worker thread. What is submitted runs in order, one call at a time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lost = False  # a call did not come back, and is not expected to
        self.broken = False  # there is no engine to run on it, for now
        self._thread = ThreadPoolExecutor(1, name)
        self._running: set[asyncio.Future[Any]] = set()

    @property
    def works(self) -> bool:
        return not (self.lost or self.broken)

    def submit(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Run `call` on the thread, after what was submitted before."""
        running = asyncio.get_running_loop().run_in_executor(self._thread, call)
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return running

    async def shutdown(self, limit_s: float) -> bool:
        """Wait for the call in progress, at most so long; whether it came back."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._running and not self.lost:
            await asyncio.wait(self._running, timeout=limit_s)
        return not self._running
