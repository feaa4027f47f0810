"""Caller shares: under contention, a caller over its share leaves room for callers below theirs.

Admitted requests are never removed for another caller, so only a request that arrives can be
rejected. A caller over its share may therefore only have work waiting that leaves others room:

    demand   part of the machine that a caller's waiting requests need: the work due by one of its
             deadlines over the time until then, the largest over its deadlines; or its part of the
             queue's limit, if that is more
    limit    of the demand: what remains if the others get what they offer, by weighted max-min,
             less room for the highest recent demand of another caller; but not below the part that
             the caller's weight gives it. A caller whose offered work and demand are below it on
             average is not rejected for its share
    ahead    work of a caller that ran while others waited, beyond its share: short deadlines run
             first, also those of a greedy caller. The limit holds for it, too

A limit bounds what waits, not what runs: no device idles for a caller that sends nothing. Shares
apply only while requests are rejected for load and several callers are active.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from math import exp, inf

from pcae_serve.scheduling.admission import DeviceCapacity
from pcae_serve.scheduling.request_queue import Queue, Request, urgency

#: Shares apply for this many seconds after a request was rejected for load.
HOLD_S = 10.0
#: Time constants, in seconds, of the average of offered work and of the decay of a peak.
AVERAGE_S, PEAK_S = 2.0, 10.0
#: Time, in seconds, that a new caller's first requests are averaged over, at least.
LEAST_AGE_S = 0.1
#: Weight of the newest request in the average of a caller's demand.
USUAL_WEIGHT = 1 / 32
#: Part of the machine that is left in any case, since work is counted as a lower bound.
MARGIN = 0.1
#: A caller that sent nothing for this many seconds has no share.
ACTIVE_S = 60.0
#: Callers known at once; the one that was silent for longest is forgotten.
MAX_CALLERS = 256


@dataclass(slots=True)
class _Caller:
    """What is known of a caller, from the requests that it offered, rejected ones included."""

    weight: float
    seen_s: float  # time of its last request
    first_s: float  # time of its first request
    offered: float = 0.0  # part of the machine that it offers work for, decayed until seen_s
    peak: float = 0.0  # largest demand, decayed until seen_s
    usual: float = 0.0  # demand, averaged over its requests
    ahead_s: float = 0.0  # seconds of work that ran beyond its share; below 0: that did not run
    paid_s: float = 0.0  # when its share has paid for the request that was admitted last

    def offered_at(self, now_s: float) -> float:
        """Return the average of the offered work, which is as good for a new caller."""
        known_s = max(LEAST_AGE_S, now_s - self.first_s)
        return self._decayed(now_s) / (1.0 - exp(-known_s / AVERAGE_S))

    def _decayed(self, now_s: float) -> float:
        return self.offered * exp((self.seen_s - now_s) / AVERAGE_S)

    def offer(self, work_s: float, now_s: float) -> None:
        """Add offered work, in seconds of the machine."""
        self.offered, self.peak = self._decayed(now_s) + work_s / AVERAGE_S, self.peak_at(now_s)
        self.seen_s = now_s

    def peak_at(self, now_s: float) -> float:
        return self.peak * exp((self.seen_s - now_s) / PEAK_S)


class Shares:
    """The callers of one scheduler, and what each of them may have waiting."""

    def __init__(
        self, weights: Mapping[str, float], queues: Sequence[Queue], queue_limit: int
    ) -> None:
        """weights: of callers by name, above 0; 1 for others. queues: of all waiting requests."""
        self._weights, self._queues, self._queue_limit = dict(weights), queues, queue_limit
        self._callers: dict[str, _Caller] = {}  # the one silent for longest first
        self._contended_until_s = -inf

    def __len__(self) -> int:
        return len(self._callers)

    def is_over(self, request: Request, capacity: DeviceCapacity) -> bool:
        """Return whether to reject a new request for its caller's share. Changes no state."""
        now_s, caller = capacity.now_s, self._callers.get(request.caller)
        if caller is None or not self._act(now_s):
            return False
        limit = self.limit(request.caller, now_s)
        if max(caller.offered_at(now_s), caller.usual) <= limit:
            return False
        time_s = request.deadline_s - now_s - capacity.free_in_s
        demand = max(self._demand(request, capacity), caller.ahead_s / max(time_s, 1e-9))
        # one request at a time, at the speed of its limit, is never over: no caller starves
        return demand > limit and (now_s < caller.paid_s or bool(self._waiting(request.caller)))

    def arrived(self, request: Request, capacity: DeviceCapacity) -> None:
        """Record an offered request, before it is admitted or rejected."""
        now_s, name = capacity.now_s, request.caller
        caller = self._callers.pop(name, None)
        caller = caller or _Caller(self._weights.get(name, 1.0), now_s, now_s)
        caller.offer(capacity.image_s(request.tiers[0]), now_s)
        self._callers[name] = caller
        if self._act(now_s):
            demand = min(1.0, self._demand(request, capacity))
            caller.peak = max(caller.peak, demand)
            caller.usual += USUAL_WEIGHT * (demand - caller.usual)
        for other, known in list(self._callers.items()):
            if len(self._callers) <= MAX_CALLERS and now_s - known.seen_s <= ACTIVE_S:
                break
            del self._callers[other]

    def admitted(self, request: Request, capacity: DeviceCapacity) -> None:
        """Record that the request that arrived last is admitted."""
        now_s = capacity.now_s
        if self._act(now_s):
            pays_s = capacity.image_s(request.tiers[0]) / self.limit(request.caller, now_s)
            self._callers[request.caller].paid_s = now_s + pays_s

    def refused(self, now_s: float) -> None:
        """Record that a request was rejected for load: shares apply from now on."""
        self._contended_until_s = now_s + HOLD_S

    def limit(self, name: str, now_s: float) -> float:
        """Return the limit of a caller's demand: a part of the machine, above 0 and up to 1."""
        own = self._callers[name].weight
        total = sum(caller.weight for caller in self._callers.values())
        offers, burst = [(inf, own)], 0.0
        for other, caller in self._callers.items():
            if other == name:
                continue
            offered, share = caller.offered_at(now_s), caller.weight / total
            offers.append((offered, caller.weight))
            # the callers' peaks rarely meet: there is room for one of them
            burst = max(burst, min(share, caller.peak_at(now_s)) - min(share, offered))
        return max(own / total, water_fill(1.0 - burst - MARGIN, offers)[0])

    def starts(self, batch: Iterable[Request], capacity: DeviceCapacity) -> None:
        """Account for the time of a batch whose requests still wait.

        By weight, it belongs to all callers whose work would still wait if devices had always
        served callers by weight.
        """
        if not self._act(capacity.now_s):
            return
        waiting_s, batch_s = dict[str, float](), dict[str, float]()
        for queue in self._queues:
            for name, requests in queue.by_caller.items():
                work_s = sum(capacity.image_s(request.tiers[0]) for request in requests)
                waiting_s[name] = waiting_s.get(name, 0.0) + work_s
        for request in batch:
            work_s = capacity.image_s(request.tiers[0])
            batch_s[request.caller] = batch_s.get(request.caller, 0.0) + work_s
        self._divide(batch_s, waiting_s)

    def caught_up(self) -> None:
        """Record that nothing waits: no caller is ahead of another."""
        for caller in self._callers.values():
            caller.ahead_s = 0.0

    def _act(self, now_s: float) -> bool:
        return len(self._callers) > 1 and now_s < self._contended_until_s

    def _waiting(self, name: str) -> list[Request]:
        """Return a caller's waiting requests, the earliest deadline first."""
        return list(merge(*(q.by_caller.get(name, ()) for q in self._queues), key=urgency))

    def _demand(self, request: Request, capacity: DeviceCapacity) -> float:
        """Return the demand of a caller's waiting requests and a new one, from its deadline on."""
        waiting = self._waiting(request.caller)
        start_s = capacity.now_s + capacity.free_in_s
        work_s, most = capacity.image_s(request.tiers[0]), (len(waiting) + 1) / self._queue_limit
        due_s = request.deadline_s
        for other in waiting:
            if other.deadline_s > due_s:
                most = max(most, work_s / max(due_s - start_s, 1e-9))
                due_s = other.deadline_s
            work_s += capacity.image_s(other.tiers[0])
        return max(most, work_s / max(due_s - start_s, 1e-9))

    def _divide(self, batch_s: Mapping[str, float], waiting_s: Mapping[str, float]) -> None:
        """Divide the seconds of a batch, by caller, among callers with waiting work or behind."""
        callers = [(n, c) for n, c in self._callers.items() if waiting_s.get(n) or c.ahead_s]
        owed = [(max(0.0, waiting_s.get(n, 0.0) + c.ahead_s), c.weight) for n, c in callers]
        parts_s = water_fill(sum(batch_s.values()), owed)
        for (name, caller), part_s in zip(callers, parts_s, strict=True):
            caller.ahead_s += batch_s.get(name, 0.0) - part_s
        # what callers are behind is lost if they leave or expire: no caller is ahead of them then
        ahead_s = sum(caller.ahead_s for _, caller in callers if caller.ahead_s > 0)
        behind_s = -sum(caller.ahead_s for _, caller in callers if caller.ahead_s < 0)
        for _, caller in callers:
            if ahead_s > behind_s and caller.ahead_s > 0:
                caller.ahead_s *= behind_s / ahead_s


def water_fill(amount: float, wants: Sequence[tuple[float, float]]) -> list[float]:
    """Divide `amount` among (wanted, weight) by weighted max-min fairness, in their order.

    Each gets at most what it wants; what one does not want goes to the others by weight.
    """
    parts = [0.0] * len(wants)
    weight = sum(own for _, own in wants)
    for i in sorted(range(len(wants)), key=lambda i: wants[i][0] / wants[i][1]):
        want, own = wants[i]
        parts[i] = min(want, max(0.0, amount) * own / weight)
        amount -= parts[i]
        weight -= own
    return parts
