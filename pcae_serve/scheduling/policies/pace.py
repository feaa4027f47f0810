"""Pace, the default: the most accurate tier that meets every deadline and is worth the wait.

Speed scaling (Yao, Demers, Shenker, "A scheduling model for reduced CPU energy", FOCS 1995) with
accuracy in place of energy: jobs with deadlines, a processor with several speeds, and a gain that
diminishes with every further reduction of speed. The optimal schedule there always runs at the
slowest speed that meets all deadlines; here a speed is a tier.

    horizons  for a few times from now: how many queued and expected requests are due by then
    floor     a batch on the cheapest tier, as large as the required throughput needs
    better    tiers with which every horizon can be kept if later batches run one tier lower, and
              whose accuracy outweighs the deadlines that they are expected to miss
    choice    the most accurate of these, or, if waiting has a price, the one whose accuracy most
              outweighs the response time that it costs

Pace has no state: latencies come from the forecast, expected requests from the arrival statistics.
"""

from collections.abc import Iterator
from itertools import repeat

from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.policies.outlook import Batch, Outlook, look
from pcae_serve.scheduling.policies.waiting_price import WaitingPrice
from pcae_serve.scheduling.request_queue import due
from pcae_serve.scheduling.tiers import TierTable

#: Arrivals planned for when keeping horizons: the mean plus this many standard deviations.
MARGIN = 1.0
#: Answers' worth of accuracy that must be gained per missed deadline in the worst case over all
#: distributions. A deadline missed in expectation costs one answer.
WORST_CASE_PRICE = 10.0
#: Tolerance for rounding errors, in seconds.
ROUNDING_S = 1e-9


class Pace:
    """Speed scaling over tiers, with batches and uncertain arrivals."""

    name = "pace"

    def __init__(self, tier_table: TierTable, waiting_price: float = 0.0) -> None:
        """waiting_price: accuracy points per 100 ms of response time; 0: waiting is free."""
        self._price = WaitingPrice(tier_table, waiting_price)

    def choose(self, view: SchedulerView) -> Run:
        outlook = look(view)
        floor = self._floor(outlook)
        better = self._better_batches(outlook, floor)
        if self._price or view.escalations is not None:
            batch = self._price.best(outlook, floor, reversed(list(better)))
        else:
            batch = next(better, floor)
        return batch.run(view)

    def _better_batches(self, outlook: Outlook, floor: Batch) -> Iterator[Batch]:
        """Yield batches whose accuracy outweighs the misses expected, the most accurate first."""
        tiers = outlook.tiers
        second = self._better_batch(outlook, 1) if len(tiers) > 1 else None
        if second is None:
            return  # better tiers are slower still
        misses: tuple[list[float], float] | None = None
        for place in range(len(tiers) - 1, 0, -1):
            better = second if place == 1 else self._better_batch(outlook, place)
            if better is None:
                continue
            if misses is None:
                misses = (
                    outlook.expected_misses(floor.busy_s, floor.end),
                    outlook.blocked(floor.busy_s, floor.end),
                )
            if self._worthwhile(outlook, better, *misses):
                yield better

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """Do nothing."""

    def _floor(self, outlook: Outlook) -> Batch:
        """Return the batch on the cheapest tier, with the most urgent requests if possible.

        An urgent request allows only a small batch, and small batches have less throughput; near
        capacity, the next requests then have even less time. If the required throughput needs
        larger batches, requests that would be late in one are passed over; they expire by timer.
        """
        view, tier = outlook.view, outlook.floor
        forecast, now_s = view.forecast, view.now_s
        waiting = view.queue.allowing(tier)
        # a request that arrives while a batch of size `twice` runs has time for another one like
        # it: up to this size a larger batch causes no misses, so it may be larger than useful, as
        # long as its images do not cost more
        efficient = forecast.efficient_batch(tier)
        max_size = max(outlook.useful, min(outlook.twice, efficient))
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

    def _batch_from(self, outlook: Outlook, tier: int, first: int, max_size: int) -> Batch:
        """Return the largest batch up to `max_size` that is in time for the request at `first`."""
        view = outlook.view
        waiting, forecast = view.queue.allowing(tier), view.forecast
        left_s = waiting[first].deadline_s - view.now_s
        size = max(1, forecast.largest_batch(tier, left_s, min(max_size, len(waiting) - first)))
        return Batch(tier, first, size, forecast.p99(tier, size))

    def _better_batch(self, outlook: Outlook, place: int) -> Batch | None:
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

    def _keeps_horizons(self, outlook: Outlook, batch: Batch, rest: int) -> bool:
        """Return whether every horizon can be kept if all later batches run on tier `rest`."""
        forecast, size = outlook.view.forecast, outlook.steady_batch(rest)
        image_s = forecast.p50(rest, size) / size
        last_s, single_s = forecast.p99(rest, size), forecast.p99(rest, 1)
        worst_s = outlook.worst_s(
            batch.busy_s, batch.size, MARGIN, image_s, repeat(last_s), single_s, ROUNDING_S
        )
        return worst_s <= ROUNDING_S

    def _worthwhile(
        self, outlook: Outlook, batch: Batch, floor_misses: list[float], floor_blocked: float
    ) -> bool:
        """Return whether the accuracy gained outweighs the deadlines that may be missed."""
        gain = sum(
            self._price.relative_gain(request, batch.tier, outlook.floor)
            for request in batch.requests(outlook.view)
        )
        if gain <= 0:
            return False
        misses = outlook.expected_misses(batch.busy_s, batch.size)
        more = max(its - floors for its, floors in zip(misses, floor_misses, strict=True))
        if WORST_CASE_PRICE * more > gain:
            return False
        return outlook.blocked(batch.busy_s, batch.end) - floor_blocked <= gain
