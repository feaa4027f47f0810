"""A device as the server sees it: a thread that does one thing at a time, and may never come back.

A call into a GPU's driver or a native library cannot be killed from outside. A thread that is lost
in one is given up: the rest of the process goes on without it, and ends without waiting for it. It
knows threads, nothing of engines or requests.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Device:
    """One worker thread. What is submitted runs in order, one call at a time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lost = False  # a call did not come back, and is not expected to
        self.broken = False  # there is no engine to run on it, for now
        self._thread = ThreadPoolExecutor(1, name)

    @property
    def works(self) -> bool:
        return not (self.lost or self.broken)

    def submit(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Run `call` on the thread, after what was submitted before."""
        return asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def shutdown(self) -> None:
        """Wait for the call in progress, but not for one that is lost."""
        if self.lost:
            self._thread.shutdown(wait=False, cancel_futures=True)
        else:
            await asyncio.to_thread(self._thread.shutdown)
