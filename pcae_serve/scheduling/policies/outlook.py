"""What `pace` decides on: the horizons of a view, and candidate batches.

A horizon is a time from now with the requests that are due by then, queued or expected. Horizons
are computed once per decision and serve all candidate batches.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, inf, sqrt
from typing import NamedTuple

from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.request_queue import Request, due

#: Queued deadlines that become horizons; with more requests, an even sample.
MAX_CHECKS = 6


class Horizon(NamedTuple):
    """Requests with a deadline within a time from now, per device."""

    within_s: float
    waiting: int  # queued, due within the horizon
    later: int  # queued, due after it
    mean: float  # expected arrivals, due within the horizon
    deviation: float  # their standard deviation


@dataclass(frozen=True)
class Outlook:
    """The view and its horizons, computed once for all candidate batches."""

    view: SchedulerView
    tiers: Sequence[int]  # that a queued request allows, the floor first
    tightest_s: float  # smallest budget
    # batch sizes on the floor tier:
    useful: int  # beyond it, the cost per image hardly falls
    twice: int  # fits twice into the smallest budget
    horizons: list[Horizon]  # the longest last

    @property
    def floor(self) -> int:
        return self.tiers[0]

    @property
    def steady(self) -> int:
        """Batch size on the floor tier in steady traffic: a request waits for one, then its own."""
        return min(self.useful, self.twice)

    def steady_batch(self, tier: int) -> int:
        """Return the batch size on a tier in steady traffic, as `steady` for the floor."""
        forecast = self.view.forecast
        useful = min(self.view.max_batch, forecast.useful_batch(tier))
        return max(1, forecast.largest_batch(tier, self.tightest_s / 2, useful))

    def image_s(self, tier: int) -> float:
        """Return the seconds per image on a tier, in steady traffic."""
        size = self.steady_batch(tier)
        return self.view.forecast.p50(tier, size) / size

    @cached_property
    def floor_image_s(self) -> float:
        """Seconds per image on the floor tier, in steady traffic."""
        return self.image_s(self.floor)

    @cached_property
    def arrival_rate(self) -> float:
        """Requests per second and device, over the last requests."""
        return self.view.arrivals.rate(self.view.now_s) / self.view.devices

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

    def blocked(self, busy_s: float, taken: int) -> float:
        """Return the arrivals during a batch of `taken` that are expected to be late by it."""
        view = self.view
        arrivals, forecast = view.arrivals, view.forecast
        left = max(0, len(view.queue) - taken)
        coming, _ = arrivals.count_within(busy_s)
        next_batch = max(1, min(self.useful, round(left + coming)))
        done_s = busy_s + forecast.p99(self.floor, next_batch)
        blocked = 0.0
        for budgets in arrivals.classes:
            if done_s <= budgets.budget_s:
                break
            over_s = min(busy_s, done_s - budgets.budget_s)
            blocked += budgets.share * arrivals.count_within(over_s)[0]
        return blocked / view.devices

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
class Batch:
    """A candidate: `size` requests from position `first` of those that allow the tier."""

    tier: int
    first: int
    size: int
    busy_s: float

    @property
    def end(self) -> int:
        """Position after the last request: that many leave the queue or are passed over."""
        return self.first + self.size

    def requests(self, view: SchedulerView) -> Sequence[Request]:
        return view.queue.allowing(self.tier)[self.first : self.end]

    def run(self, view: SchedulerView) -> Run:
        return Run(self.tier, tuple(self.requests(view)))


def look(view: SchedulerView) -> Outlook:
    """Compute the horizons. The devices are equal and share the requests; there may be none."""
    queue, forecast, now_s = view.queue, view.forecast, view.now_s
    arrivals, devices = view.arrivals, view.devices
    waiting, classes = queue.by_deadline, arrivals.classes
    # the cheapest tier of the most urgent request; less urgent ones may be pinned to cheaper tiers
    floor = waiting[0].tiers[0] if waiting else 0
    tiers = [tier for tier in queue.tiers if tier >= floor] or [floor]
    tightest_s = classes[0].budget_s if classes else waiting[0].budget_s if waiting else inf
    useful = min(view.max_batch, forecast.useful_batch(floor))
    twice = max(1, forecast.largest_batch(floor, tightest_s / 2, view.max_batch))

    step = max(1, len(waiting) // MAX_CHECKS)
    deadlines = [(waiting[i].deadline_s - now_s, i + 1) for i in range(1, len(waiting), step)]
    for budgets in classes:  # deadlines of the next arrivals
        within_s = budgets.budget_s * 1.0001
        deadlines.append((within_s, due(waiting, now_s + within_s)))
    last_s = waiting[-1].deadline_s - now_s if waiting else 0.0
    deadlines.append((max(last_s, classes[-1].budget_s if classes else 0.0) * 1.05, len(waiting)))

    horizons = []
    for within_s, count in deadlines:
        mean, deviation = arrivals.count_due(within_s)
        horizons.append(
            Horizon(
                within_s,
                ceil(count / devices),
                len(waiting) - count,
                mean / devices,
                deviation / devices,
            )
        )
    return Outlook(view, tiers, tightest_s, useful, twice, horizons)
