"""SlackFit: choose tier and batch size by the slack of the most urgent request.

The policy of SuperServe (Khare et al., NSDI 2025). Latencies are divided into buckets. A bucket
offers the (tier, batch) with the largest batch among those whose p99 falls into it, then the most
accurate tier. Load is visible only through the slack that queueing has used up.
"""

from math import ceil

from pcae_serve.scheduling.latency import Forecast
from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.policies.fixed import batch_in_time

BUCKETS = 32
#: Buckets are recomputed if a tier's latency has changed by more than this.
CHANGE = 0.05


class SlackFit:
    """Takes the highest bucket below the slack, and up to its batch size of queued requests."""

    name = "slackfit"

    def __init__(self) -> None:
        self._buckets: dict[tuple[int, ...], _Buckets] = {}  # by the allowed tiers of a request

    def choose(self, view: SchedulerView) -> Run:
        queue, forecast = view.queue, view.forecast
        head = queue.by_deadline[0]
        buckets = self._buckets.get(head.tiers)
        if buckets is None or buckets.outdated(forecast, view.max_batch):
            buckets = _Buckets(forecast, head.tiers, view.max_batch)
            self._buckets[head.tiers] = buckets
        choice = buckets.below(head.deadline_s - view.now_s)
        if choice is None:  # less slack than the fastest bucket
            tier = head.tiers[0]
            choice = tier, batch_in_time(view, tier, forecast.useful_batch(tier))
        tier, batch = choice
        return Run(tier, tuple(queue.allowing(tier)[:batch]))

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """Do nothing; the forecast learns."""


class _Buckets:
    """Equally spaced from one image on the cheapest tier to a full batch on the most accurate."""

    def __init__(self, forecast: Forecast, tiers: tuple[int, ...], max_batch: int) -> None:
        self._tiers, self._max_batch = tiers, max_batch
        self._single_s = [forecast.p99(tier, 1) for tier in tiers]
        max_sizes = {tier: min(max_batch, forecast.useful_batch(tier)) for tier in tiers}
        self._low_s = forecast.p99(tiers[0], 1)
        high_s = forecast.p99(tiers[-1], max_sizes[tiers[-1]])
        self._width_s = max((high_s - self._low_s) / (BUCKETS - 1), 1e-9)
        self._best: list[tuple[int, int]] = [(tiers[0], 1)] * BUCKETS
        best: dict[int, tuple[int, int]] = {}  # bucket -> (batch, tier)
        for tier in tiers:
            for batch in range(1, max_sizes[tier] + 1):
                above_s = forecast.p99(tier, batch) - self._low_s
                bucket = max(0, ceil(above_s / self._width_s - 1e-9))
                best[bucket] = max(best.get(bucket, (0, 0)), (batch, tier))
        batch, tier = 1, tiers[0]
        for bucket in range(BUCKETS):  # an empty bucket offers the choice of the one below
            batch, tier = best.get(bucket, (batch, tier))
            self._best[bucket] = tier, batch

    def outdated(self, forecast: Forecast, max_batch: int) -> bool:
        return max_batch != self._max_batch or any(
            abs(forecast.p99(tier, 1) - single_s) > CHANGE * single_s
            for tier, single_s in zip(self._tiers, self._single_s, strict=True)
        )

    def below(self, slack_s: float) -> tuple[int, int] | None:
        """Return (tier, batch) of the highest bucket that ends within the slack."""
        above_s = slack_s - self._low_s
        if above_s < 0:
            return None
        return self._best[int(min(above_s / self._width_s, BUCKETS - 1))]
