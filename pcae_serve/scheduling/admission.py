"""Admission control: whether a new request can be served without making accepted ones late.

This is the demand test of earliest-deadline-first scheduling: up to every deadline, the work due by
then must fit into the time left. Work is a lower bound: each request on its cheapest tier, in
batches of a useful size. The overload factor corrects the bound with what happened to accepted
requests, so that overload is refused at once and not after a long wait.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Literal

from pcae_serve.scheduling.latency import Forecast
from pcae_serve.scheduling.request_queue import Queue, Request, due

#: Factors applied to the overload factor for each accepted request that missed its deadline, and
#: for each answer in time. They balance at about one miss in thirty.
RISE, FALL = 1.02, 0.9994
#: Upper bound of the overload factor; the lower bound is 1.
MAX_FACTOR = 3.0
#: Number of later deadlines checked per queue; of more, an evenly spaced sample is checked.
MAX_CHECKS = 16


class OverloadFactor:
    """Learned ratio of real work to the lower bound that admission computes."""

    def __init__(self) -> None:
        self.times = 1.0

    def missed(self, requests: int) -> None:
        """Raise the factor: this many accepted requests missed their deadline."""
        self.times = min(MAX_FACTOR, self.times * RISE**requests)

    def in_time(self, requests: int) -> None:
        """Lower the factor: this many requests were answered in time."""
        self.times = max(1.0, self.times * FALL**requests)

    def caught_up(self) -> None:
        """Reset the factor: nothing is running or waiting, so the overload is over."""
        self.times = 1.0


@dataclass(frozen=True, slots=True)
class DeviceCapacity:
    """The devices that serve the queue, at one point in time."""

    now_s: float
    forecast: Forecast
    max_batch: int
    devices: int
    free_in_s: float  # until the first device has finished its batch
    overload_factor: float = 1.0  # real work over its lower bound

    def seconds(self, queues: Iterable[Queue], by_s: float, extra_tier: int | None = None) -> float:
        """Return the seconds until all requests due by `by_s` are done, each on its cheapest tier.

        extra_tier: the tier of one further request, if any.
        """
        counts: dict[int, int] = {} if extra_tier is None else {extra_tier: 1}
        for queue in queues:
            for tier, requests in queue.by_cheapest.items():
                counts[tier] = counts.get(tier, 0) + due(requests, by_s)
        # devices share the requests, but each batch still takes its full time
        shares = {tier: ceil(count / self.devices) for tier, count in counts.items()}
        work_s = sum(self._batches_s(tier, n) for tier, n in shares.items())
        return self.free_in_s + work_s * self.overload_factor

    def _batches_s(self, tier: int, count: int) -> float:
        """Return the seconds of `count` images on one tier, in batches of a useful size."""
        size = min(self.max_batch, self.forecast.useful_batch(tier))
        full, rest = divmod(count, size)
        work_s = full * self.forecast.p50(tier, size)
        return work_s + self.forecast.p50(tier, rest) if rest else work_s


def check_admission(
    request: Request, needed_s: float, capacity: DeviceCapacity, queues: tuple[Queue, ...]
) -> Literal["budget", "load"] | None:
    """Return why `request` cannot be served in addition to all in `queues`, or None if it can.

    needed_s: what its fastest allowed tier takes on an idle machine.
    """
    if needed_s > request.budget_s:
        return "budget"
    cheapest, forecast = request.tiers[0], capacity.forecast
    margin_s = forecast.p99(cheapest, 1) - forecast.p50(cheapest, 1)
    idle = capacity.free_in_s <= 0 and not any(queues)
    if idle:  # if it is too late already, load is not the reason
        return None
    for deadline_s in _deadlines(request, queues):
        done_s = capacity.now_s + capacity.seconds(queues, deadline_s, cheapest) + margin_s
        if done_s > deadline_s:
            return "load"
    return None


def _deadlines(request: Request, queues: tuple[Queue, ...]) -> Iterable[float]:
    """Yield the request's own deadline and a sample of those that it would push back."""
    yield request.deadline_s
    for queue in queues:
        requests = queue.by_deadline
        behind = len(requests) - (ahead := due(requests, request.deadline_s))
        step = max(1, behind // MAX_CHECKS)
        for i in range(ahead, len(requests), step):
            yield requests[i].deadline_s
