"""Admission control: whether a new request can be served without making accepted ones late.

This is the demand test of earliest-deadline-first scheduling: up to every deadline, the work due by
then must fit into the time left. Work is a lower bound: each request on its cheapest tier, in
batches of a useful size. The overload factor corrects the bound with what happened to accepted
requests, so that overload is refused at once and not after a long wait.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import merge
from itertools import islice
from math import ceil

from pcae_serve.scheduling.events import RejectReason
from pcae_serve.scheduling.feasibility import ROUNDING_S
from pcae_serve.scheduling.latency import Forecast
from pcae_serve.scheduling.request_queue import Queue, Request, due, urgency

#: Factors applied to the overload factor for each accepted request that missed its deadline, and
#: for each answer in time. They balance at about one miss in thirty.
RISE, FALL = 1.02, 0.9994
#: Upper bound of the overload factor; the lower bound is 1.
MAX_FACTOR = 3.0


class OverloadFactor:
    """Learned ratio of real work to the lower bound that admission computes."""

    def __init__(self) -> None:
        self.times = 1.0

    @property
    def overloaded(self) -> bool:
        """Whether accepted requests have missed their deadline lately."""
        return self.times > 1.0

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

    def drain_s(self, queues: Iterable[Queue]) -> float:
        """Return the seconds until all requests are done, each on its cheapest tier."""
        counts = Counter[int]()
        for queue in queues:
            for tier, requests in queue.by_cheapest.items():
                counts[tier] += len(requests)
        return self.done_s(self.batches_s(tier, n) for tier, n in counts.items()) - self.now_s

    def done_s(self, work_s: Iterable[float]) -> float:
        """Return when work of that many seconds per device is done."""
        return self.now_s + self.free_in_s + sum(work_s) * self.overload_factor

    def image_s(self, tier: int) -> float:
        """Return the seconds of all devices together that an image takes in a useful batch."""
        size = min(self.max_batch, self.forecast.useful_batch(tier))
        return self.forecast.p50(tier, size) / size / self.devices * self.overload_factor

    def batches_s(self, tier: int, count: int) -> float:
        """Return the seconds per device of `count` images on one tier, in useful batches.

        Devices share the requests, but each batch still takes its full time.
        """
        size = min(self.max_batch, self.forecast.useful_batch(tier))
        full, rest = divmod(ceil(count / self.devices), size)
        work_s = full * self.forecast.p50(tier, size)
        return work_s + self.forecast.p50(tier, rest) if rest else work_s


def check_admission(
    request: Request, needed_s: float, capacity: DeviceCapacity, queues: tuple[Queue, ...]
) -> RejectReason | None:
    """Return why `request` cannot be served in addition to all in `queues`, or None if it can.

    needed_s: what its fastest allowed tier takes on an idle machine.
    """
    if request.decode_s + needed_s > request.budget_s:
        return "budget"
    cheapest, forecast, now_s = request.tiers[0], capacity.forecast, capacity.now_s
    image_s = forecast.p50(cheapest, 1)
    margin_s = forecast.p99(cheapest, 1) - image_s
    decoders_idle = request.ready_s <= now_s + request.decode_s + ROUNDING_S
    if capacity.free_in_s <= 0 and not any(queues) and decoders_idle:
        # if it is too late already, load is not the reason
        return "expired" if now_s + request.decode_s + image_s > request.deadline_s else None
    if now_s + request.decode_s + needed_s > request.deadline_s + ROUNDING_S:
        return "expired"  # its upload took too long, whatever the load
    if request.ready_s + image_s + margin_s > request.deadline_s:
        return "load"
    return None if _fits(request, capacity, queues, margin_s) else "load"


def _fits(
    request: Request, capacity: DeviceCapacity, queues: tuple[Queue, ...], margin_s: float
) -> bool:
    """Return whether the work due by each deadline, from the request's own on, fits before it."""
    counts = Counter({request.tiers[0]: 1})  # by tier, due by the deadline in question
    total = Counter(counts)
    for queue in queues:
        for tier, requests in queue.by_cheapest.items():
            counts[tier] += due(requests, request.deadline_s)
            total[tier] += len(requests)
    work_s = {tier: capacity.batches_s(tier, count) for tier, count in counts.items()}
    margin_s += ROUNDING_S
    if capacity.done_s(work_s.values()) + margin_s > request.deadline_s:
        return False
    total_s = {tier: capacity.batches_s(tier, count) for tier, count in total.items()}
    last_s = capacity.done_s(total_s.values()) + margin_s
    behind = (islice(q.by_deadline, due(q.by_deadline, request.deadline_s), None) for q in queues)
    for other in merge(*behind, key=urgency):
        if last_s <= other.deadline_s:
            return True  # all work is done by this deadline, and the others are later
        counts[(tier := other.tiers[0])] += 1
        work_s[tier] = capacity.batches_s(tier, counts[tier])
        if capacity.done_s(work_s.values()) + margin_s > other.deadline_s:
            return False
    return True
