"""A device as the server sees it: a thread that does one thing at a time, and may never come back.

A call into a GPU's driver or a native library cannot be killed from outside. A thread that is lost
in one is given up: the rest of the process goes on without it, and ends without waiting for it. It
knows threads, nothing of engines or requests.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Device:
    """One worker thread. What is submitted runs in order, one call at a time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lost = False  # a call did not come back, and is not expected to
        self._thread = ThreadPoolExecutor(1, name)
        self._running: set[Future[Any]] = set()

    def submit(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Run `call` on the thread, after what was submitted before."""
        running = self._thread.submit(call)
        self._running.add(running)  # asyncio's future may be cancelled; the call goes on
        running.add_done_callback(self._running.discard)
        return asyncio.wrap_future(running)

    @property
    def busy(self) -> bool:
        """Whether a call is in progress, or waits for its turn."""
        return bool(self._running)

    async def shutdown(self, limit_s: float) -> bool:
        """Wait for the call in progress, at most so long; whether it came back."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if not self.lost:
            end_s = time.monotonic() + limit_s
            while self.busy and time.monotonic() < end_s:
                await asyncio.sleep(0.01)
        return not self.busy
