"""Admission: can the machine still serve everything it has taken, and this one too?

The test of earliest-deadline-first scheduling: up to every deadline in hand, the work due by then
must fit into the time there is. Work is counted at each request's cheapest tier, in batches worth
filling: the least it can be. How much more it really is (smaller batches for tight budgets, a busy
host) is learnt from those who were taken and could not be served: overload is to be told at once,
not after a long wait.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Literal

from pcae_serve.scheduling.latency import Forecast
from pcae_serve.scheduling.request_queue import Queue, Request, due

#: The overload factor rises by RISE with each admitted request that misses its deadline and falls
#: by FALL with each answer in time, so it settles at about one miss in thirty; it stays in bounds.
RISE, FALL, STRICTEST = 1.02, 0.9994, 3.0
#: Deadlines looked at behind a newcomer; where there are more, every so manyth.
MAX_CHECKS = 16


class OverloadFactor:
    """Learnt: by how much the test of admission underestimates the work in hand."""

    def __init__(self) -> None:
        self.times = 1.0

    def in_vain(self, requests: int) -> None:
        self.times = min(STRICTEST, self.times * RISE**requests)

    def in_time(self, requests: int) -> None:
        self.times = max(1.0, self.times * FALL**requests)

    def caught_up(self) -> None:
        """Nothing is running or waiting: whatever held the work up is over."""
        self.times = 1.0


@dataclass(frozen=True, slots=True)
class DeviceCapacity:
    """What there is to serve with, now."""

    now_s: float
    forecast: Forecast
    max_batch: int
    devices: int
    free_in_s: float  # until the first device is done with its batch
    overload_factor: float = 1.0  # how much longer work in hand takes than it should

    def seconds(self, queues: Iterable[Queue], by_s: float, extra_tier: int | None = None) -> float:
        """Until all due by `by_s` are done, each on its cheapest tier, and one more on its own."""
        counts: dict[int, int] = {} if extra_tier is None else {extra_tier: 1}
        for queue in queues:
            for tier, requests in queue.by_cheapest.items():
                counts[tier] = counts.get(tier, 0) + due(requests, by_s)
        # the devices share the requests, not the time of a batch
        shares = {tier: ceil(count / self.devices) for tier, count in counts.items()}
        work_s = sum(self._batches_s(tier, n) for tier, n in shares.items())
        return self.free_in_s + work_s * self.overload_factor

    def _batches_s(self, tier: int, count: int) -> float:
        """Seconds of `count` images on one tier, in batches worth filling."""
        size = min(self.max_batch, self.forecast.useful_batch(tier))
        full, rest = divmod(count, size)
        work_s = full * self.forecast.p50(tier, size)
        return work_s + self.forecast.p50(tier, rest) if rest else work_s


def check_admission(
    request: Request, needed_s: float, machine: DeviceCapacity, queues: tuple[Queue, ...]
) -> Literal["budget", "load"] | None:
    """Why `request` cannot be served beside all in `queues`, or None; `needed_s` when idle."""
    if needed_s > request.budget_s:
        return "budget"
    cheapest, forecast = request.tiers[0], machine.forecast
    margin_s = forecast.p99(cheapest, 1) - forecast.p50(cheapest, 1)
    free = machine.free_in_s <= 0 and not any(queues)
    if free:  # whatever is too late now, the load is not to blame
        return None
    for deadline_s in _deadlines(request, queues):
        done_s = machine.now_s + machine.seconds(queues, deadline_s, cheapest) + margin_s
        if done_s > deadline_s:
            return "load"
    return None


def _deadlines(request: Request, queues: tuple[Queue, ...]) -> Iterable[float]:
    """The newcomer's own, and some of those that it would push back."""
    yield request.deadline_s
    for queue in queues:
        requests = queue.by_deadline
        behind = len(requests) - (ahead := due(requests, request.deadline_s))
        step = max(1, behind // MAX_CHECKS)
        for i in range(ahead, len(requests), step):
            yield requests[i].deadline_s
