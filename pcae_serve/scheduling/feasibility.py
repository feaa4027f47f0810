"""Feasibility: no choice of a policy costs another request its deadline.

The reference schedule is earliest-deadline-first with every request on its cheapest allowed tier:
the next free device takes the most urgent request, together with the next ones of the same cheapest
tier, as many as are worthwhile and as the most urgent request of every other tier leaves time for.
A backlog is feasible if this schedule meets every deadline, with batch times as predicted and no
further arrivals. Running the schedule's first batch leaves its rest unchanged, so the backlog stays
feasible. Any other choice is carried out only if the reference schedule of what it leaves misses no
more deadlines.
"""

from bisect import insort
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace, merge
from math import inf

from pcae_serve.scheduling.latency import Forecast
from pcae_serve.scheduling.policies.base import Run, Wait
from pcae_serve.scheduling.request_queue import Queue, Request, due, urgency

#: Seconds by which a batch has to end before a deadline, so that rounding costs no request its own.
ROUNDING_S = 1e-6


@dataclass(frozen=True, slots=True)
class Backlog:
    """All waiting requests, and when each device is free."""

    free_s: tuple[float, ...]  # by device, not empty; a time, not a duration
    waiting: Mapping[int, Sequence[Request]]  # by cheapest tier, earliest deadline first
    forecast: Forecast
    max_batch: int

    def misses(self) -> int:
        """Return how many deadlines the reference schedule misses; 0 if the backlog is feasible."""
        return _ReferenceSchedule(self).misses()

    def first_batch(self, now_s: float) -> Run | None:
        """Return the reference schedule's next batch; None if no deadline can be met."""
        return _ReferenceSchedule(self).first_batch(now_s)

    def adding(self, request: Request) -> "Backlog":
        """Return this backlog with one more request."""
        tier = request.tiers[0]
        requests = list(self.waiting.get(tier, ()))
        insort(requests, request, key=urgency)
        return replace(self, waiting={**self.waiting, tier: requests})

    def misses_after(self, run: Run, now_s: float, device: int) -> int:
        """Return how many deadlines are missed if `run` starts now: its own and those it leaves.

        device: index in free_s of the device that runs it.
        """
        gone = [*run.requests, *run.dropped]
        ids, last_s = {request.id for request in gone}, max(r.deadline_s for r in gone)
        waiting = dict(self.waiting)
        for tier in {request.tiers[0] for request in gone} & waiting.keys():
            requests = waiting[tier]
            end = due(requests, last_s)  # behind it, every request stays
            waiting[tier] = [r for r in requests[:end] if r.id not in ids] + list(requests[end:])
        bound_s = now_s + self.forecast.p99(run.tier, len(run.requests)) + ROUNDING_S
        missed = sum(
            request.deadline_s < bound_s
            for request in run.requests
            if request.tiers[0] in self.waiting
        )
        missed += sum(request.tiers[0] in self.waiting for request in run.dropped)
        end_s = now_s + self.forecast.p50(run.tier, len(run.requests))
        return missed + replace(self.busy_until(end_s, device), waiting=waiting).misses()

    def busy_until(self, time_s: float, device: int) -> "Backlog":
        """Return this backlog with a device that starts nothing before `time_s`."""
        free_s = list(self.free_s)
        free_s[device] = max(free_s[device], time_s)
        return replace(self, free_s=tuple(free_s))

    def without_tier(self, tier: int) -> "Backlog":
        """Return this backlog without the requests whose cheapest tier is `tier`."""
        return replace(self, waiting={t: rs for t, rs in self.waiting.items() if t != tier})


def group_by_cheapest(queues: Collection[Queue]) -> dict[int, Sequence[Request]]:
    """Return the requests of several queues by cheapest tier, earliest deadline first: views."""
    grouped: dict[int, Sequence[Request]] = {}
    for tier in {tier for queue in queues for tier in queue.cheapest_tiers}:
        parts = [part for queue in queues if (part := queue.by_cheapest.get(tier))]
        grouped[tier] = parts[0] if len(parts) == 1 else list(merge(*parts, key=urgency))
    return grouped


def keep_feasible(
    choice: Run | Wait,
    backlog: Backlog,
    queue: Queue,
    *,
    now_s: float,
    device: int,
    latest_start_s: float,
    overloaded: bool,
) -> Run | Wait:
    """Return the choice, or the reference schedule's batch if the choice costs more deadlines.

    backlog: all waiting requests, those being decoded included. queue: the decoded ones, which a
    batch can hold. device: index in backlog.free_s. latest_start_s: when the most urgent request
    has to start.

    overloaded: accepted requests have missed deadlines lately. Then a batch on the cheapest tier of
    the most urgent request is judged by its effect on the requests of other tiers only. Which
    requests of its own tier it passes over is up to the policy: under overload, small batches for
    urgent requests cost more requests than they save.
    """
    if isinstance(choice, Wait):
        until_s = min(choice.until_s, latest_start_s)
        missed = backlog.busy_until(until_s, device).misses()
    else:
        if overloaded and choice.tier == queue.by_deadline[0].tiers[0]:
            backlog = backlog.without_tier(choice.tier)
        missed = backlog.misses_after(choice, now_s, device)
    if not missed:
        return choice
    reference = replace(backlog, waiting=group_by_cheapest((queue,))).first_batch(now_s)
    if reference is None:
        return choice
    return reference if backlog.misses_after(reference, now_s, device) < missed else choice


class _ReferenceSchedule:
    """The reference schedule of a backlog, built batch by batch."""

    def __init__(self, backlog: Backlog) -> None:
        self._forecast, self._free_s = backlog.forecast, backlog.free_s
        self._waiting = {tier: requests for tier, requests in backlog.waiting.items() if requests}
        self._next = dict.fromkeys(self._waiting, 0)  # by tier, index of its most urgent request
        self._single_s = {tier: backlog.forecast.p99(tier, 1) for tier in self._waiting}
        self._worthwhile = {
            tier: max(1, min(backlog.max_batch, backlog.forecast.useful_batch(tier)))
            for tier in self._waiting
        }
        # an upper bound of the seconds that one image takes, alone or in a worthwhile batch
        self._image_s = {
            tier: max(self._single_s[tier], backlog.forecast.p50(tier, size) / size)
            for tier, size in self._worthwhile.items()
        }
        self._left_s = sum(len(rs) * self._image_s[tier] for tier, rs in self._waiting.items())

    def misses(self) -> int:
        missed, free_s = 0, list(self._free_s)
        heapify(free_s)
        while self._next:
            now_s, tier = free_s[0], self._most_urgent()
            deadline_s = self._waiting[tier][self._next[tier]].deadline_s
            if max(free_s) + self._left_s + ROUNDING_S <= deadline_s:
                break  # even one by one on the last free device, nothing that is left is late
            size = self._size(tier, now_s, min(free_s[1:3], default=inf))
            if size:
                heapreplace(free_s, now_s + self._forecast.p50(tier, size))
            else:
                missed += 1
            self._take(tier, max(1, size))
        return missed

    def first_batch(self, now_s: float) -> Run | None:
        other_free_s = sorted(self._free_s)[1] if len(self._free_s) > 1 else inf
        while self._next:
            tier = self._most_urgent()
            if size := self._size(tier, now_s, other_free_s):
                first = self._next[tier]
                return Run(tier, tuple(self._waiting[tier][first : first + size]))
            self._take(tier, 1)
        return None

    def _most_urgent(self) -> int:
        """Return the cheapest tier of the most urgent request that is left."""
        return min(self._next, key=lambda tier: urgency(self._waiting[tier][self._next[tier]]))

    def _size(self, tier: int, now_s: float, other_free_s: float) -> int:
        """Return the size of the most urgent request's batch; 0 if that request will be late.

        other_free_s: when another device is free.
        """
        first = self._next[tier]
        slack_s = self._waiting[tier][first].deadline_s - now_s - ROUNDING_S
        if self._single_s[tier] > slack_s:
            return 0
        size = min(self._worthwhile[tier], len(self._waiting[tier]) - first)
        if size == 1:
            return 1
        for other, i in self._next.items():
            if other == tier:
                continue
            start_s = self._waiting[other][i].deadline_s - self._single_s[other] - ROUNDING_S
            # requests that another device takes, or that are late in any case, set no limit
            if start_s < other_free_s and now_s + self._single_s[tier] <= start_s:
                slack_s = min(slack_s, start_s - now_s)
        while size > 1 and self._forecast.p99(tier, size) > slack_s:
            size -= 1
        return size

    def _take(self, tier: int, count: int) -> None:
        self._left_s -= count * self._image_s[tier]
        self._next[tier] += count
        if self._next[tier] >= len(self._waiting[tier]):
            del self._next[tier]
