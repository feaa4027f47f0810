"""Pace: the slowest pace that what is due allows, and with it the most accurate tier (ours).

The question of speed scaling (Yao, Demers, Shenker, "A scheduling model for reduced CPU energy",
FOCS 1995) with accuracy in the place of energy: work with deadlines, a processor that may run at
several speeds, and a gain that falls with every further step of slowness. There the best schedule
keeps to the slowest speed that still meets each deadline; here that speed is a tier.

    due      by each of a few horizons: how many are waiting, how many will have come
    floor    the cheapest tier's batch, as large as the pace that is due needs it to be
    tier     the most accurate one that keeps the pace, if those that follow run one tier lower,
             and whose accuracy is worth the deadlines that it is expected to cost

It learns nothing of its own: what it expects is the forecast's and the arrivals' to know.
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

#: Deadlines in the queue that are looked at; where there are more, every so manyth.
MAX_CHECKS = 6
#: Arrivals to reckon with when keeping the pace: the expected, and so many standard deviations.
MARGIN = 1.0
#: Accuracy (of one answer = 1) that must be gained for each deadline missed by a bound that no
#: distribution exceeds; by an expectation, one answer pays for another.
WORST_CASE_PRICE = 10.0
#: Seconds by which sums may be off.
ROUNDING_S = 1e-9


class _Horizon(NamedTuple):
    """What is due within a time from now."""

    within_s: float
    waiting: int
    behind: int  # wait too, and are due later
    mean: float  # of those still to come
    deviation: float


@dataclass(frozen=True)
class _Outlook:
    """The view, measured once for all candidates."""

    view: SchedulerView
    tiers: Sequence[int]  # that somebody waiting allows
    tightest_s: float
    # images in a batch of the cheapest of them:
    useful: int  # beyond which there is little to gain
    twice: int  # that fits twice into the tightest budget
    horizons: list[_Horizon]

    @property
    def floor(self) -> int:
        return self.tiers[0]

    @property
    def steady(self) -> int:
        """The cheapest tier's batch in steady traffic: the tightest wait for one, and their own."""
        return min(self.useful, self.twice)

    @cached_property
    def _costs(self) -> list[tuple[float, float]]:
        """For each horizon, seconds an image and of the last batch: as large as there is time."""
        forecast, floor = self.view.forecast, self.floor
        costs = []
        for h in self.horizons:
            size = max(self.steady, forecast.largest(floor, h.within_s / 2, self.useful))
            last_s = forecast.p99(floor, min(size, h.behind + 1))
            costs.append((forecast.p50(floor, size) / size, last_s))
        return costs

    def after(self, busy_s: float, taken: int) -> list[float]:
        """Misses to be expected at most by each horizon, once a batch of so many is done.

        Scarf's bound (1958) on E[(X - room)+] of a count X of which mean and variance are known.
        """
        single_s = self.view.forecast.p99(self.floor, 1)
        misses = []
        for h, (image_s, last_s) in zip(self.horizons, self._costs, strict=True):
            known = max(0, h.waiting - taken)
            left_s = h.within_s - busy_s - (last_s if known else single_s) + image_s
            off = left_s / image_s - known - h.mean
            bound = (sqrt(h.deviation * h.deviation + off * off) - off) / 2
            misses.append(min(bound, known + h.mean))  # no more can miss than there are
        return misses

    def overrun_s(self, busy_s: float, taken: int, image_s: float) -> float:
        """Seconds by which the worst horizon is missed, at so many seconds an image."""
        single_s = self.view.forecast.p99(self.floor, 1)
        return self.worst_s(busy_s, taken, 0.0, image_s, self._last_s, single_s)

    @cached_property
    def _last_s(self) -> list[float]:
        """For each horizon, seconds of the last batch before it, in steady traffic."""
        forecast, floor, steady = self.view.forecast, self.floor, self.steady
        return [forecast.p99(floor, min(steady, h.behind + 1)) for h in self.horizons]

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
        """Seconds by which the worst horizon is missed once a batch is done; or the first `enough`.

        margin: of arrivals, in standard deviations; image_s: of each that follows; last_s: of the
        last batch of those who wait, by horizon; single_s: of one that comes when nobody waits.
        """
        worst_s = 0.0
        for h, its_last_s in zip(self.horizons, last_s, strict=False):
            coming = h.mean + margin * h.deviation
            if h.waiting > taken:
                work_s = (h.waiting - taken + coming - 1) * image_s + its_last_s
            elif coming > 0.5:
                work_s = coming * image_s + single_s
            else:  # nobody is due
                continue
            over_s = busy_s + work_s - h.within_s
            if over_s > worst_s:
                worst_s = over_s
                if over_s > enough_s:
                    break
        return worst_s


@dataclass(frozen=True, slots=True)
class _Batch:
    """A candidate: from `first` in the list of those that allow the tier, `size` requests."""

    tier: int
    first: int
    size: int
    busy_s: float

    @property
    def gone(self) -> int:
        """Requests that no longer wait once it runs."""
        return self.first + self.size


class Pace:
    """Speed scaling over tiers, in batches, with arrivals that are only expected."""

    name = "pace"

    def __init__(self, tier_table: TierTable) -> None:
        self._accuracy = tier_table.accuracy

    def choose(self, view: SchedulerView) -> Run:
        outlook = _look(view)
        floor = self._floor(outlook)
        tiers = outlook.tiers
        second = self._keeping(outlook, 1) if len(tiers) > 1 else None
        if second is None:
            return self._run(view, floor)  # all others are slower still
        misses: tuple[list[float], float] | None = None
        for place in range(len(tiers) - 1, 0, -1):
            better = second if place == 1 else self._keeping(outlook, place)
            if better is None:
                continue
            if misses is None:
                misses = outlook.after(floor.busy_s, floor.gone), self._blocked(outlook, floor)
            if self._worth(outlook, better, *misses):
                return self._run(view, better)
        return self._run(view, floor)

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """Nothing to learn here."""

    def _floor(self, outlook: _Outlook) -> _Batch:
        """The cheapest tier's batch: for the earliest deadlines, unless those hold up the rest.

        A head with little time left allows a small batch only, and small batches are slow: near
        capacity they leave the next heads with still less time. Where the pace that is due needs
        larger batches, heads that are too late for one are passed over; they expire by timer.
        """
        view, tier = outlook.view, outlook.floor
        forecast, now_s = view.forecast, view.now_s
        waiting = view.queue.allowing(tier)
        # who comes while a batch runs that fits twice has still time for one like it: so far larger
        # batches cost nobody his deadline, and are taken however little they gain
        most = max(outlook.useful, outlook.twice)
        # requests a second that are due
        pace = max((h.waiting + h.mean) / h.within_s for h in outlook.horizons)
        size = forecast.keeping(tier, pace, most)
        target = min(len(waiting), size)
        skipped = due(waiting, now_s + forecast.p99(tier, target) - ROUNDING_S)
        full = self._from(outlook, tier, min(skipped, len(waiting) - 1), most)
        if not full.first:
            return full
        image_s = forecast.p50(tier, size) / size
        headed = self._from(outlook, tier, 0, most)
        lost = [
            batch.first
            + outlook.overrun_s(forecast.p50(tier, batch.size), batch.gone, image_s) / image_s
            for batch in (headed, full)
        ]
        return headed if lost[0] <= lost[1] else full

    def _from(self, outlook: _Outlook, tier: int, first: int, most: int) -> _Batch:
        """The largest batch up to `most` that the request at `first` allows."""
        view = outlook.view
        waiting, forecast = view.queue.allowing(tier), view.forecast
        left_s = waiting[first].deadline_s - view.now_s
        size = max(1, forecast.largest(tier, left_s, min(most, len(waiting) - first)))
        return _Batch(tier, first, size, forecast.p99(tier, size))

    def _keeping(self, outlook: _Outlook, place: int) -> _Batch | None:
        """The earliest deadlines on a better tier, as many as the first allows.

        None: the first cannot make it there, or not every horizon could be kept thereafter.
        """
        view, tier = outlook.view, outlook.tiers[place]
        most = min(view.max_batch, view.forecast.useful_batch(tier))
        batch = self._from(outlook, tier, 0, most)
        head = view.queue.allowing(tier)[0]
        if view.now_s + batch.busy_s > head.deadline_s:
            return None
        return batch if self._keeps_pace(outlook, batch, outlook.tiers[place - 1]) else None

    def _keeps_pace(self, outlook: _Outlook, batch: _Batch, rest: int) -> bool:
        """Whether every horizon can be kept, with all that follows on tier `rest`."""
        forecast = outlook.view.forecast
        most = min(outlook.view.max_batch, forecast.useful_batch(rest))
        # in steady traffic the tightest wait for one batch and then for their own
        size = max(1, forecast.largest(rest, outlook.tightest_s / 2, most))
        image_s = forecast.p50(rest, size) / size
        last_s, single_s = forecast.p99(rest, size), forecast.p99(rest, 1)
        worst_s = outlook.worst_s(
            batch.busy_s, batch.size, MARGIN, image_s, repeat(last_s), single_s, ROUNDING_S
        )
        return worst_s <= ROUNDING_S

    def _worth(
        self, outlook: _Outlook, batch: _Batch, floor: list[float], floor_blocked: float
    ) -> bool:
        """Whether the accuracy gained pays for the deadlines that may be missed, price included."""
        gain = batch.size * (self._accuracy[batch.tier] / self._accuracy[outlook.floor] - 1)
        misses = outlook.after(batch.busy_s, batch.size)
        more = max(its - floors for its, floors in zip(misses, floor, strict=True))
        if WORST_CASE_PRICE * more > gain:
            return False
        return self._blocked(outlook, batch) - floor_blocked <= gain

    def _blocked(self, outlook: _Outlook, batch: _Batch) -> float:
        """Requests that are expected to arrive while it runs and be too late when it is done."""
        view = outlook.view
        arrivals, forecast = view.arrivals, view.forecast
        left = max(0, len(view.queue) - batch.gone)
        coming, _ = arrivals.within(batch.busy_s)
        next_batch = max(1, min(outlook.useful, round(left + coming)))
        done_s = batch.busy_s + forecast.p99(outlook.floor, next_batch)
        blocked = 0.0
        for budgets in arrivals.classes:
            if done_s <= budgets.budget_s:
                break
            over_s = min(batch.busy_s, done_s - budgets.budget_s)
            blocked += budgets.share * arrivals.within(over_s)[0]
        return blocked / view.devices

    @staticmethod
    def _run(view: SchedulerView, batch: _Batch) -> Run:
        waiting = view.queue.allowing(batch.tier)
        return Run(batch.tier, tuple(waiting[batch.first : batch.gone]))


def _look(view: SchedulerView) -> _Outlook:
    """Measure what is due by when. The devices are equal, and share what is due."""
    queue, forecast, now_s = view.queue, view.forecast, view.now_s
    arrivals, devices = view.arrivals, view.devices
    waiting, classes = queue.by_deadline, arrivals.classes
    # the cheapest that the most urgent allows, though somebody who can wait be pinned below it
    floor = waiting[0].tiers[0]
    tiers = [tier for tier in queue.tiers if tier >= floor]
    tightest_s = classes[0].budget_s if classes else waiting[0].budget_s
    useful = min(view.max_batch, forecast.useful_batch(floor))
    twice = max(1, forecast.largest(floor, tightest_s / 2, view.max_batch))

    step = max(1, len(waiting) // MAX_CHECKS)
    whens = [(waiting[i].deadline_s - now_s, i + 1) for i in range(1, len(waiting), step)]
    for budgets in classes:  # those who come next are due then
        within_s = budgets.budget_s * 1.0001
        whens.append((within_s, due(waiting, now_s + within_s)))
    last_s = waiting[-1].deadline_s - now_s
    whens.append((max(last_s, classes[-1].budget_s if classes else 0.0) * 1.05, len(waiting)))

    horizons = []
    for within_s, count in whens:
        mean, deviation = arrivals.due(within_s)
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
