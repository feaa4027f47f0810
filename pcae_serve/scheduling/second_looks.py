"""Second looks: requests with a first answer that wait for another run on a better tier.

    offer      keep a request if a second look is expected to be worth its time
    choose     the batch of second looks worth most, on a device that nothing else needs
    overdue    requests whose second look would end too late

First looks always go first: second looks run only while the queue is empty, and only if what they
gain outweighs the deadlines of arrivals that they may cost. A request waits for its second look at
most as long as the gain is worth. The same for every policy.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from math import inf

from pcae_serve.scheduling.escalation import Escalations
from pcae_serve.scheduling.latency import Forecast
from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.policies.outlook import look
from pcae_serve.scheduling.request_queue import Queue, Request

#: Answers' worth of accuracy that must be gained per deadline missed in the worst case over all
#: distributions of arrivals. Less than in `pace`: a second look is one short batch.
WORST_CASE_PRICE = 3.0
#: Requests that may wait at a time: every decision looks at all of them.
MAX_WAITING = 256
#: A first answer is sent before its deadline by these seconds and this share of the budget: the
#: event loop may be late, too.
AHEAD_S, AHEAD_SHARE = 0.005, 0.02


def answer_by_s(request: Request) -> float:
    """Return when the answer to a request is sent at the latest, if it waits for a second look."""
    return request.deadline_s - AHEAD_S - AHEAD_SHARE * request.budget_s


class SecondLooks:
    """Requests with a first answer, by deadline; `tiers` of each are those that gain."""

    def __init__(self, escalations: Escalations, price_per_s: float) -> None:
        """price_per_s: accuracy that a second of response time must bring."""
        self._escalations, self._price_per_s = escalations, price_per_s
        self._queue, self._gains = Queue(), dict[int, dict[int, float]]()
        self._device_price_per_s = 0.0  # as of the last offer
        self.ended = not escalations  # nothing is kept any more

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, id_: int) -> bool:
        return id_ in self._queue

    def offer(
        self, request: Request, tier: int, margin: float, view: SchedulerView, batch: int
    ) -> bool:
        """Keep a request that `tier` has answered with this margin.

        Return False if a second look is not worth its device time, or cannot end in time.
        """
        if self.ended or request.max_looks < 2 or len(self) >= MAX_WAITING:
            return False
        forecast, now_s, until_s = view.forecast, view.now_s, answer_by_s(request)
        rate = view.arrivals.rate(now_s) / view.devices
        plan = self._escalations.plan(
            tier, request.tiers, forecast, rate, forecast.p50(tier, batch) / batch
        )
        self._device_price_per_s = price_per_s = plan.price_per_s if plan else 0.0
        worth = {
            second: gain
            for second, gain in self._escalations.gains(tier, margin, request.tiers).items()
            if gain > (price_per_s + self._price_per_s) * forecast.p50(second, 1)
            and now_s + forecast.p99(second, 1) <= until_s
        }
        if not worth:
            return False
        worth_s = max(worth.values()) / self._price_per_s if self._price_per_s else inf
        deadline_s = min(until_s, now_s + worth_s)
        tiers = tuple(sorted(worth))
        self._queue.add(replace(request, tiers=tiers, deadline_s=deadline_s, max_looks=1))
        self._gains[request.id] = worth
        return True

    def choose(self, view: SchedulerView, decoding: int) -> Run | None:
        """Return the batch of second looks that is worth most now, or None if none is.

        view: of the empty queue, on a device that is free. decoding: requests that are about to
        join the queue.
        """
        best, best_value = None, 0.0
        forecast, now_s = view.forecast, view.now_s
        outlook = look(view)
        before = outlook.expected_misses(0.0, 0)
        rate = outlook.arrival_rate
        for tier in self._queue.tiers:
            by_gain = sorted(
                self._queue.allowing(tier), key=lambda r: self._gains[r.id][tier], reverse=True
            )
            useful = min(view.max_batch, forecast.useful_batch(tier))
            members, gain = list[Request](), 0.0
            for request in by_gain:
                if len(members) >= useful:
                    break
                busy_s = forecast.p99(tier, len(members) + 1)
                if now_s + busy_s > request.deadline_s or (
                    members and now_s + busy_s > min(r.deadline_s for r in members)
                ):
                    continue
                members.append(request)
                gain += self._gains[request.id][tier]
                mean_s = forecast.p50(tier, len(members))
                waited_s = (len(members) + decoding + rate * mean_s / 2) * mean_s
                value = gain - self._price_per_s * waited_s - self._device_price_per_s * mean_s
                if value <= best_value:
                    continue
                after = outlook.expected_misses(busy_s, 0)
                missed = max(a - b for a, b in zip(after, before, strict=True))
                if max(WORST_CASE_PRICE * missed, outlook.blocked(busy_s, 0)) <= gain:
                    best, best_value = Run(tier, tuple(members)), value
        return best

    def take(self, ids: Collection[int]) -> None:
        """Remove requests that run now."""
        for id_ in ids:
            self.remove(id_)

    def remove(self, id_: int) -> Request | None:
        """Remove and return a request, or None if it does not wait for a second look."""
        self._gains.pop(id_, None)
        return self._queue.remove(id_)

    def disable(self, tier: int) -> list[int]:
        """Remove a tier from all requests; remove those that allow no other, return their ids."""
        answered = list[int]()
        for request in list(self._queue.allowing(tier)):
            gains = self._gains[request.id]
            self.remove(request.id)
            del gains[tier]
            if gains:
                self._queue.add(replace(request, tiers=tuple(sorted(gains))))
                self._gains[request.id] = gains
            else:
                answered.append(request.id)
        return sorted(answered)

    def end(self) -> list[int]:
        """Remove all requests, keep none from now on, and return their ids."""
        self.ended = True
        ids = sorted(request.id for request in self._queue)
        self.take(ids)
        return ids

    def overdue(self, now_s: float, forecast: Forecast) -> list[int]:
        """Remove requests that no second look can serve in time, and return their ids."""
        late = list[int]()
        for tier, requests in self._queue.by_cheapest.items():
            soonest_s = now_s + forecast.p99(tier, 1)
            for request in requests:
                if request.deadline_s >= soonest_s:
                    break
                late.append(request.id)
        self.take(late)
        return sorted(late)

    def latest_starts(self, forecast: Forecast) -> Iterator[float]:
        """Yield, per cheapest tier, when its most urgent request has to start."""
        for tier, requests in self._queue.by_cheapest.items():
            if requests:
                yield requests[0].deadline_s - forecast.p99(tier, 1)
