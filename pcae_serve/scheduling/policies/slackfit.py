"""SlackFit: the head's slack names a bucket of latencies, the bucket a tier and a batch.

SuperServe's policy (Khare et al., "SuperServe", NSDI 2025). A bucket holds the (tier, batch) whose
promised seconds lie in it and offers the largest batch, then the most accurate tier. SlackFit sees
load only in the slack that a queue has eaten; it does not know how many are waiting.
"""

from math import ceil

from pcae_serve.scheduling.latency import Forecast
from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.policies.fixed import batch_in_time

BUCKETS = 32
#: Buckets are drawn anew when a tier's seconds have changed by more than this.
CHANGE = 0.05


class SlackFit:
    """The bucket just below the slack; its batch, or as many as there are."""

    name = "slackfit"

    def __init__(self) -> None:
        self._drawn: dict[tuple[int, ...], _Buckets] = {}  # by the tiers that a head allows

    def choose(self, view: SchedulerView) -> Run:
        queue, forecast = view.queue, view.forecast
        head = queue.by_deadline[0]
        buckets = self._drawn.get(head.tiers)
        if buckets is None or buckets.outdated(forecast, view.max_batch):
            buckets = _Buckets(forecast, head.tiers, view.max_batch)
            self._drawn[head.tiers] = buckets
        found = buckets.below(head.deadline_s - view.now_s)
        if found is None:  # no bucket is that quick
            tier = head.tiers[0]
            found = tier, batch_in_time(view, tier, forecast.useful_batch(tier))
        tier, batch = found
        return Run(tier, tuple(queue.allowing(tier)[:batch]))

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """SlackFit learns nothing but what the forecast has learnt."""


class _Buckets:
    """Equally spaced from the cheapest tier's single image to the most accurate's full batch."""

    def __init__(self, forecast: Forecast, tiers: tuple[int, ...], max_batch: int) -> None:
        self._tiers, self._max_batch = tiers, max_batch
        self._figures_s = [forecast.p99(tier, 1) for tier in tiers]
        most = {tier: min(max_batch, forecast.useful_batch(tier)) for tier in tiers}
        self._low_s = forecast.p99(tiers[0], 1)
        high_s = forecast.p99(tiers[-1], most[tiers[-1]])
        self._width_s = max((high_s - self._low_s) / (BUCKETS - 1), 1e-9)
        self._best: list[tuple[int, int]] = [(tiers[0], 1)] * BUCKETS
        best: dict[int, tuple[int, int]] = {}  # bucket -> (batch, tier)
        for tier in tiers:
            for batch in range(1, most[tier] + 1):
                above_s = forecast.p99(tier, batch) - self._low_s
                bucket = max(0, ceil(above_s / self._width_s - 1e-9))
                best[bucket] = max(best.get(bucket, (0, 0)), (batch, tier))
        batch, tier = 1, tiers[0]
        for bucket in range(BUCKETS):  # an empty one offers what the one below it does
            batch, tier = best.get(bucket, (batch, tier))
            self._best[bucket] = tier, batch

    def outdated(self, forecast: Forecast, max_batch: int) -> bool:
        return max_batch != self._max_batch or any(
            abs(forecast.p99(tier, 1) - drawn_s) > CHANGE * drawn_s
            for tier, drawn_s in zip(self._tiers, self._figures_s, strict=True)
        )

    def below(self, slack_s: float) -> tuple[int, int] | None:
        """(tier, batch) of the highest bucket that ends within the slack."""
        above_s = slack_s - self._low_s
        if above_s < 0:
            return None
        return self._best[int(min(above_s / self._width_s, BUCKETS - 1))]
