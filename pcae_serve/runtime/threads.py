"""Thread pools that tolerate calls that never return, and the single thread of a device.

A call into a GPU driver or native library cannot be killed from outside. A thread that hangs in
one is abandoned: the process continues without it and does not wait for it at exit.
"""

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

#: Added to the nice value of these threads. The event loop needs a CPU for fractions of a
#: millisecond; at equal priority it would wait for the engine's time slices.
NICENESS = 5


class Threads:
    """A pool of `count` threads. Calls start in the order of their submission."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        self._threads = ThreadPoolExecutor(count, name, _lower_priority)
        self._running: set[Future[Any]] = set()

    def submit(
        self, call: Callable[[], T], on_end: Callable[[], None] | None = None
    ) -> asyncio.Future[T]:
        """Run `call` on a thread, after those submitted before.

        on_end: called once, on the event loop, when no thread works on the call any more. That may
        be later than the end of the returned future: a call that runs cannot be cancelled.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        running = self._threads.submit(call)

        def ended() -> None:
            if on_end is not None:
                on_end()
            if answer.done():  # it was cancelled
                return
            if running.cancelled():
                answer.cancel()
            elif (error := running.exception()) is not None:
                answer.set_exception(error)
            else:
                answer.set_result(running.result())

        def answered(_: asyncio.Future[T]) -> None:
            if answer.cancelled():
                running.cancel()

        # one wake-up of the loop for all that follows a call (asyncio.wrap_future adds another)
        self._running.add(running)  # asyncio's future may be cancelled while the call continues
        running.add_done_callback(self._running.discard)
        running.add_done_callback(partial(_call_on, loop, ended))
        answer.add_done_callback(answered)
        return answer

    @property
    def busy(self) -> bool:
        """Whether a call is running or waiting."""
        return bool(self._running)

    async def shutdown(self, limit_s: float) -> bool:
        """Wait at most `limit_s` for running calls; return whether all have ended."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        end_s = time.monotonic() + limit_s
        while self.busy and time.monotonic() < end_s:
            await asyncio.sleep(0.01)
        return not self.busy


class Device(Threads):
    """The thread of one device, which runs one call at a time."""

    def __init__(self, name: str) -> None:
        super().__init__(name, 1)
        self.lost = False  # a call hangs and is not expected to return

    async def shutdown(self, limit_s: float) -> bool:
        """Do as `Threads.shutdown`, but do not wait for a lost device."""
        return await super().shutdown(0.0 if self.lost else limit_s)


def _call_on(loop: asyncio.AbstractEventLoop, callback: Callable[[], None], _: Future[Any]) -> None:
    """Call back on the event loop, unless it is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)


def _lower_priority() -> None:
    """Run this thread at a lower priority than the event loop. Only Linux sets it per thread."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):  # some sandboxes forbid it
            now = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, now + NICENESS)
