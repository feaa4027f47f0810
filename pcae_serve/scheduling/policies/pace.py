"""Pace, the default: the most accurate tier that still meets every queued and expected deadline.

Speed scaling (Yao, Demers, Shenker, "A scheduling model for reduced CPU energy", FOCS 1995) with
accuracy in place of energy: jobs with deadlines, a processor with several speeds, and a gain that
diminishes with every further reduction of speed. The optimal schedule there always runs at the
slowest speed that meets all deadlines; here a speed is a tier.

    horizons  for a few times from now: how many queued and expected requests are due by then
    floor     a batch on the cheapest tier, as large as the required throughput needs
    choice    the most accurate tier with which every horizon can be kept if later batches run one
              tier lower, and whose accuracy outweighs the deadlines it is expected to miss

Pace has no state: latencies come from the forecast, expected requests from the arrival statistics.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from math import ceil, inf, sqrt
from typing import NamedTuple

from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.request_queue import due
from pcae_serve.scheduling.tiers import TierTable

#: Queued deadlines that become horizons; with more requests, an even sample.
MAX_CHECKS = 6
#: Arrivals planned for when keeping horizons: the mean plus this many standard deviations.
MARGIN = 1.0
#: Answers' worth of accuracy that must be gained per missed deadline in the worst case over all
#: distributions. A deadline missed in expectation costs one answer.
WORST_CASE_PRICE = 10.0
#: Tolerance for rounding errors, in seconds.
ROUNDING_S = 1e-9


class _Horizon(NamedTuple):
    """Requests with a deadline within a time from now, per device."""

    within_s: float
    waiting: int  # queued, due within the horizon
    later: int  # queued, due after it
    mean: float  # expected arrivals, due within the horizon
    deviation: float  # their standard deviation


@dataclass(frozen=True)
class _Outlook:
    """The view and its horizons, computed once for all candidate batches."""

    view: SchedulerView
    tiers: Sequence[int]  # that a queued request allows, the floor first
    tightest_s: float  # smallest budget
    # batch sizes on the floor tier:
    useful: int  # beyond it, the cost per image hardly falls
    twice: int  # fits twice into the smallest budget
    horizons: list[_Horizon]

    @property
    def floor(self) -> int:
        return self.tiers[0]

    @property
    def steady(self) -> int:
        """Batch size on the floor tier in steady traffic: a request waits for one, then its own."""
        return min(self.useful, self.twice)

    @cached_property
    def _costs(self) -> list[tuple[float, float]]:
        """For each horizon: seconds per image, and seconds of the last batch before it."""
        forecast, floor = self.view.forecast, self.floor
        costs = []
        for h in self.horizons:
            size = max(self.steady, forecast.largest_batch(floor, h.within_s / 2, self.useful))
            last_s = forecast.p99(floor, min(size, h.later + 1))
            costs.append((forecast.p50(floor, size) / size, last_s))
        return costs

    def expected_misses(self, busy_s: float, taken: int) -> list[float]:
        """Return a bound on the expected misses by each horizon after a batch of `taken` requests.

        Scarf's bound (1958) on E[(X - room)+] for a count X of known mean and variance; `off` is
        the room left beyond the mean.
        """
        single_s = self.view.forecast.p99(self.floor, 1)
        misses = []
        for h, (image_s, last_s) in zip(self.horizons, self._costs, strict=True):
            known = max(0, h.waiting - taken)
            left_s = h.within_s - busy_s - (last_s if known else single_s) + image_s
            off = left_s / image_s - known - h.mean
            bound = (sqrt(h.deviation * h.deviation + off * off) - off) / 2
            misses.append(min(bound, known + h.mean))  # at most all of them
        return misses

    def overrun_s(self, busy_s: float, taken: int, image_s: float) -> float:
        """Return the seconds by which the worst horizon is missed, at `image_s` per image."""
        single_s = self.view.forecast.p99(self.floor, 1)
        return self.worst_s(busy_s, taken, 0.0, image_s, self._last_s, single_s)

    @cached_property
    def _last_s(self) -> list[float]:
        """For each horizon: seconds of the last batch before it, in steady traffic."""
        forecast, floor, steady = self.view.forecast, self.floor, self.steady
        return [forecast.p99(floor, min(steady, h.later + 1)) for h in self.horizons]

    def worst_s(
        self,
        busy_s: float,
        taken: int,
        margin: float,
        image_s: float,
        last_s: Iterable[float],
        single_s: float,
        enough_s: float = inf,
    ) -> float:
        """Return the seconds by which the worst horizon is missed after a batch of `taken`.

        margin: arrivals planned for beyond the mean, in standard deviations. image_s: seconds per
        further image. last_s: seconds of the last batch, by horizon. single_s: seconds of a request
        that arrives at an empty queue. Stops at the first horizon missed by more than `enough_s`.
        """
        worst_s = 0.0
        for h, its_last_s in zip(self.horizons, last_s, strict=False):
            coming = h.mean + margin * h.deviation
            if h.waiting > taken:
                work_s = (h.waiting - taken + coming - 1) * image_s + its_last_s
            elif coming > 0.5:
                work_s = coming * image_s + single_s
            else:  # no request is due
                continue
            over_s = busy_s + work_s - h.within_s
            if over_s > worst_s:
                worst_s = over_s
                if over_s > enough_s:
                    break
        return worst_s


@dataclass(frozen=True, slots=True)
class _Batch:
    """A candidate: `size` requests from position `first` of those that allow the tier."""

    tier: int
    first: int
    size: int
    busy_s: float

    @property
    def end(self) -> int:
        """Position after the last request: that many leave the queue or are passed over."""
        return self.first + self.size


class Pace:
    """Speed scaling over tiers, with batches and uncertain arrivals."""

    name = "pace"

    def __init__(self, tier_table: TierTable) -> None:
        self._accuracy = tier_table.accuracy

    def choose(self, view: SchedulerView) -> Run:
        outlook = _look(view)
        floor = self._floor(outlook)
        tiers = outlook.tiers
        second = self._better_batch(outlook, 1) if len(tiers) > 1 else None
        if second is None:
            return self._run(view, floor)  # better tiers are slower still
        misses: tuple[list[float], float] | None = None
        for place in range(len(tiers) - 1, 0, -1):
            better = second if place == 1 else self._better_batch(outlook, place)
            if better is None:
                continue
            if misses is None:
                misses = (
                    outlook.expected_misses(floor.busy_s, floor.end),
                    self._blocked(outlook, floor),
                )
            if self._worthwhile(outlook, better, *misses):
                return self._run(view, better)
        return self._run(view, floor)

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """Do nothing."""

    def _floor(self, outlook: _Outlook) -> _Batch:
        """Return the batch on the cheapest tier, with the most urgent requests if possible.

        An urgent request allows only a small batch, and small batches have less throughput; near
        capacity, the next requests then have even less time. If the required throughput needs
        larger batches, requests that would be late in one are passed over; they expire by timer.
        """
        view, tier = outlook.view, outlook.floor
        forecast, now_s = view.forecast, view.now_s
        waiting = view.queue.allowing(tier)
        # a request that arrives while a batch of size `twice` runs has time for another one like
        # it: up to this size a larger batch causes no misses, so it may be larger than useful
        max_size = max(outlook.useful, outlook.twice)
        # required throughput, requests per second
        pace = max((h.waiting + h.mean) / h.within_s for h in outlook.horizons)
        size = forecast.batch_for_rate(tier, pace, max_size)
        target = min(len(waiting), size)
        skipped = due(waiting, now_s + forecast.p99(tier, target) - ROUNDING_S)
        passing = self._batch_from(outlook, tier, min(skipped, len(waiting) - 1), max_size)
        if not passing.first:
            return passing
        image_s = forecast.p50(tier, size) / size
        urgent = self._batch_from(outlook, tier, 0, max_size)
        lost = [
            batch.first
            + outlook.overrun_s(forecast.p50(tier, batch.size), batch.end, image_s) / image_s
            for batch in (urgent, passing)
        ]
        return urgent if lost[0] <= lost[1] else passing

    def _batch_from(self, outlook: _Outlook, tier: int, first: int, max_size: int) -> _Batch:
        """Return the largest batch up to `max_size` that is in time for the request at `first`."""
        view = outlook.view
        waiting, forecast = view.queue.allowing(tier), view.forecast
        left_s = waiting[first].deadline_s - view.now_s
        size = max(1, forecast.largest_batch(tier, left_s, min(max_size, len(waiting) - first)))
        return _Batch(tier, first, size, forecast.p99(tier, size))

    def _better_batch(self, outlook: _Outlook, place: int) -> _Batch | None:
        """Return the largest batch of the most urgent requests on the tier at `place`.

        None if the first of them would be late, or if some horizon could not be kept afterwards.
        """
        view, tier = outlook.view, outlook.tiers[place]
        max_size = min(view.max_batch, view.forecast.useful_batch(tier))
        batch = self._batch_from(outlook, tier, 0, max_size)
        head = view.queue.allowing(tier)[0]
        if view.now_s + batch.busy_s > head.deadline_s:
            return None
        return batch if self._keeps_horizons(outlook, batch, outlook.tiers[place - 1]) else None

    def _keeps_horizons(self, outlook: _Outlook, batch: _Batch, rest: int) -> bool:
        """Return whether every horizon can be kept if all later batches run on tier `rest`."""
        forecast = outlook.view.forecast
        max_size = min(outlook.view.max_batch, forecast.useful_batch(rest))
        # in steady traffic, a request with the smallest budget waits for one batch and its own
        size = max(1, forecast.largest_batch(rest, outlook.tightest_s / 2, max_size))
        image_s = forecast.p50(rest, size) / size
        last_s, single_s = forecast.p99(rest, size), forecast.p99(rest, 1)
        worst_s = outlook.worst_s(
            batch.busy_s, batch.size, MARGIN, image_s, repeat(last_s), single_s, ROUNDING_S
        )
        return worst_s <= ROUNDING_S

    def _worthwhile(
        self, outlook: _Outlook, batch: _Batch, floor_misses: list[float], floor_blocked: float
    ) -> bool:
        """Return whether the accuracy gained outweighs the deadlines that may be missed."""
        # compared with each request's own cheapest tier: one that is pinned to this tier gains
        # nothing
        taken = outlook.view.queue.allowing(batch.tier)[batch.first : batch.end]
        cheapest = [max(outlook.floor, request.tiers[0]) for request in taken]
        gain = sum(self._accuracy[batch.tier] / self._accuracy[tier] - 1 for tier in cheapest)
        if gain <= 0:
            return False
        misses = outlook.expected_misses(batch.busy_s, batch.size)
        more = max(its - floors for its, floors in zip(misses, floor_misses, strict=True))
        if WORST_CASE_PRICE * more > gain:
            return False
        return self._blocked(outlook, batch) - floor_blocked <= gain

    def _blocked(self, outlook: _Outlook, batch: _Batch) -> float:
        """Return the expected arrivals during the batch that will be late because of it."""
        view = outlook.view
        arrivals, forecast = view.arrivals, view.forecast
        left = max(0, len(view.queue) - batch.end)
        coming, _ = arrivals.count_within(batch.busy_s)
        next_batch = max(1, min(outlook.useful, round(left + coming)))
        done_s = batch.busy_s + forecast.p99(outlook.floor, next_batch)
        blocked = 0.0
        for budgets in arrivals.classes:
            if done_s <= budgets.budget_s:
                break
            over_s = min(batch.busy_s, done_s - budgets.budget_s)
            blocked += budgets.share * arrivals.count_within(over_s)[0]
        return blocked / view.devices

    @staticmethod
    def _run(view: SchedulerView, batch: _Batch) -> Run:
        waiting = view.queue.allowing(batch.tier)
        return Run(batch.tier, tuple(waiting[batch.first : batch.end]))


def _look(view: SchedulerView) -> _Outlook:
    """Compute the horizons. The devices are equal and share the requests."""
    queue, forecast, now_s = view.queue, view.forecast, view.now_s
    arrivals, devices = view.arrivals, view.devices
    waiting, classes = queue.by_deadline, arrivals.classes
    # the cheapest tier of the most urgent request; less urgent ones may be pinned to cheaper tiers
    floor = waiting[0].tiers[0]
    tiers = [tier for tier in queue.tiers if tier >= floor]
    tightest_s = classes[0].budget_s if classes else waiting[0].budget_s
    useful = min(view.max_batch, forecast.useful_batch(floor))
    twice = max(1, forecast.largest_batch(floor, tightest_s / 2, view.max_batch))

    step = max(1, len(waiting) // MAX_CHECKS)
    deadlines = [(waiting[i].deadline_s - now_s, i + 1) for i in range(1, len(waiting), step)]
    for budgets in classes:  # deadlines of the next arrivals
        within_s = budgets.budget_s * 1.0001
        deadlines.append((within_s, due(waiting, now_s + within_s)))
    last_s = waiting[-1].deadline_s - now_s
    deadlines.append((max(last_s, classes[-1].budget_s if classes else 0.0) * 1.05, len(waiting)))

    horizons = []
    for within_s, count in deadlines:
        mean, deviation = arrivals.count_due(within_s)
        horizons.append(
            _Horizon(
                within_s,
                ceil(count / devices),
                len(waiting) - count,
                mean / devices,
                deviation / devices,
            )
        )
    return _Outlook(view, tiers, tightest_s, useful, twice, horizons)
