"""Threads that may never come back, and a device as the server sees it: one that takes turns.

A call into a GPU's driver or a native library cannot be killed from outside. A thread that is lost
in one is given up: the rest of the process goes on without it, and ends without waiting for it. It
knows threads, nothing of engines or requests.
"""

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

#: How much these threads stand back where cores are short. The event loop wants a core for a
#: fraction of a millisecond at a time; behind an engine's turns, refusals took 36 ms instead of 12.
NICENESS = 5


class Threads:
    """So many threads. What is submitted begins in order."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        self._threads = ThreadPoolExecutor(count, name, _stand_back)
        self._running: set[Future[Any]] = set()

    def submit(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Run `call` on a thread, after what was submitted before."""
        running = self._threads.submit(call)
        self._running.add(running)  # asyncio's future may be cancelled; the call goes on
        running.add_done_callback(self._running.discard)
        return asyncio.wrap_future(running)

    @property
    def busy(self) -> bool:
        """Whether a call is in progress, or waits for its turn."""
        return bool(self._running)

    async def shutdown(self, limit_s: float) -> bool:
        """Wait for calls in progress, at most so long; whether all came back."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        end_s = time.monotonic() + limit_s
        while self.busy and time.monotonic() < end_s:
            await asyncio.sleep(0.01)
        return not self.busy


class Device(Threads):
    """One thread: one call at a time."""

    def __init__(self, name: str) -> None:
        super().__init__(name, 1)
        self.lost = False  # a call did not come back, and is not expected to

    async def shutdown(self, limit_s: float) -> bool:
        """As of any threads; what is lost is not waited for."""
        return await super().shutdown(0.0 if self.lost else limit_s)


def _stand_back() -> None:
    """Let this thread take its turns after the event loop's. Elsewhere it would be all threads."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):  # in a sandbox that forbids even this
            now = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, now + NICENESS)
