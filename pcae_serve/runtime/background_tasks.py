"""Run background tasks on devices, when the scheduler starts them.

submit -> TaskSubmitted -> scheduler -> StartTask -> start -> worker -> Done
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pcae_serve.errors import Draining
from pcae_serve.runtime.worker import Worker
from pcae_serve.scheduling.events import Done, Event, StartTask, TaskSubmitted

T = TypeVar("T")


@dataclass(frozen=True)
class _Task:
    work: Callable[[int], Any]
    terminate: Callable[[], None] | None
    result: asyncio.Future[Any]


class BackgroundTasks:
    """Tasks that were submitted and not yet started, by id."""

    def __init__(self, workers: Sequence[Worker], handle: Callable[[Event], None]) -> None:
        """Create an empty queue.

        workers: one per device. handle: passes an event to the scheduler.
        """
        self._workers, self._handle = workers, handle
        self._ids = itertools.count()
        self._waiting: dict[int, _Task] = {}
        self._stopped = False

    @property
    def waiting(self) -> int:
        """Number of tasks that have not started."""
        return len(self._waiting)

    async def submit(
        self,
        seconds: float,
        work: Callable[[int], T],
        terminate: Callable[[], None] | None = None,
    ) -> T:
        """Run `work(device)` on a device thread without making requests late; return its result.

        seconds: expected run time. terminate: ends a call that exceeds the watchdog limit; None:
        the device's engine is terminated. Raises Draining after `cancel`, TimeoutError if the call
        exceeds the watchdog limit, or what `work` raises.
        """
        if self._stopped:
            raise Draining
        loop = asyncio.get_running_loop()
        id_, result = next(self._ids), loop.create_future()
        self._waiting[id_] = _Task(work, terminate, result)
        self._handle(TaskSubmitted(loop.time(), id_, seconds))
        done: T = await result
        return done

    def start(self, action: StartTask) -> None:
        """Run the task that the scheduler starts."""
        task = self._waiting.pop(action.id)

        def ended(call: asyncio.Future[Any]) -> None:
            _copy(call, task.result)
            self._handle(Done(asyncio.get_running_loop().time(), action.device, None))

        def hung(error: TimeoutError) -> None:
            if not task.result.done():
                task.result.set_exception(error)

        worker = self._workers[action.device]
        worker.run(partial(task.work, action.device), ended, hung, task.terminate)

    def cancel(self) -> None:
        """Cancel all tasks that have not started, and accept no more."""
        self._stopped = True
        for task in self._waiting.values():
            task.result.cancel()


def _copy(call: asyncio.Future[Any], result: asyncio.Future[Any]) -> None:
    """Set `result` to the result, error or cancellation of `call`, unless it is set already."""
    if call.cancelled():
        result.cancel()
    elif not result.done():
        if (error := call.exception()) is not None:
            result.set_exception(error)
        else:
            result.set_result(call.result())
