"""Background tasks: a queue of device work that must not make requests late.

A reload measures its new bundle this way, and a disabled tier is probed this way. A task normally
starts when a device is idle. On a busy server, tasks get a small guaranteed share of one device,
and admission reserves it.
"""

from collections import deque
from dataclasses import dataclass

from pcae_serve.scheduling.arrivals import Arrivals
from pcae_serve.scheduling.latency import Forecast

#: A task may start on an idle device if the expected number of requests that it delays past their
#: deadline is at most this.
MAX_EXPECTED_LATE = 0.05
#: A task that has waited this long may start on any free device while the queue is empty, whatever
#: is still being decoded or expected to arrive.
MAX_IDLE_WAIT_S = 2.0
#: Share of one device that tasks may use while requests are queued, provided that every queued
#: request can still meet its deadline after the task.
SPARE_SHARE = 0.05
#: Share of one device that tasks get even if queued requests become late. Admission reserves it.
GUARANTEED_SHARE = 0.01
#: Upper limit, in seconds, on the pause between two tasks that follows from either share.
MAX_PAUSE_S = 5.0
#: Interval, in seconds, between checks for an idle moment while no other event arrives.
RECHECK_S = 0.1


@dataclass(frozen=True)
class BackgroundTask:
    id: int
    submitted_s: float
    seconds: float  # expected run time


class BackgroundTasks:
    """First-in-first-out queue of background tasks; decides when the first one may start."""

    def __init__(self) -> None:
        self._tasks: deque[BackgroundTask] = deque()
        self._last_start_s, self._last_seconds = 0.0, 0.0

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def submit(self, task: BackgroundTask) -> None:
        self._tasks.append(task)

    def start(self, now_s: float) -> BackgroundTask:
        """Remove and return the first task, which starts now."""
        task = self._tasks.popleft()
        self._last_start_s, self._last_seconds = now_s, task.seconds
        return task

    def reserved_s(self, now_s: float) -> float:
        """Return the seconds that admission must reserve: those of the first task if it is due."""
        return self._tasks[0].seconds if self._is_due(now_s, GUARANTEED_SHARE) else 0.0

    def may_delay_queue(self, now_s: float, latest_start_s: float) -> bool:
        """Return whether the first task may run before queued requests.

        latest_start_s: when the most urgent queued request has to start to be in time.
        """
        if self._is_due(now_s, GUARANTEED_SHARE):
            return True
        if not self._is_due(now_s, SPARE_SHARE):
            return False
        return now_s + self._tasks[0].seconds < latest_start_s

    def may_use_idle_device(
        self, now_s: float, *, decoding: bool, forecast: Forecast, arrivals: Arrivals
    ) -> bool:
        """Return whether the first task may run on a free device while the queue is empty.

        decoding: whether requests are about to join the queue.
        """
        if not self._tasks:
            return False
        task = self._tasks[0]
        if now_s >= task.submitted_s + MAX_IDLE_WAIT_S or self._is_due(now_s, GUARANTEED_SHARE):
            return True
        late = expected_late(task.seconds, now_s, forecast, arrivals)
        return not decoding and late <= MAX_EXPECTED_LATE

    def _is_due(self, now_s: float, share: float) -> bool:
        """Return whether tasks have used less than `share` of a device since the last start."""
        if not self._tasks:
            return False
        task = self._tasks[0]
        pause_s = min(MAX_PAUSE_S, max(task.seconds, self._last_seconds) / share)
        return now_s - max(self._last_start_s, task.submitted_s) > pause_s


def expected_late(seconds: float, now_s: float, forecast: Forecast, arrivals: Arrivals) -> float:
    """Return the expected arrivals within `seconds` that would be late after waiting that long."""
    after_s = seconds + forecast.p99(0, 1)
    tight = sum(each.share for each in arrivals.classes if each.budget_s < after_s)
    return tight * seconds * arrivals.rate(now_s)
