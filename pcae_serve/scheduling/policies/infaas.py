"""INFaaS: the slowest tier within the most urgent request's slack, scaled down under load.

Selection per query as in Romero et al., "INFaaS", ATC 2021; scaling as Proteus (Ahmad et al.,
ASPLOS 2024) models it for a fixed set of machines: a larger batch first, which costs no accuracy,
then a cheaper variant. Only the most urgent request is considered, not those behind it.
"""

from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.policies.fixed import batch_in_time
from pcae_serve.scheduling.policies.greedy import full_batch

#: Highest utilisation of a tier; above it, it is scaled down.
MAX_UTILISATION = 0.9


class Infaas:
    """Tiers are the variants; all of them are loaded, so that a switch costs nothing."""

    name = "infaas"

    def choose(self, view: SchedulerView) -> Run:
        tier, limit = self._scale(view, self._select(view))
        batch = batch_in_time(view, tier, limit)
        return Run(tier, tuple(view.queue.allowing(tier)[:batch]))

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """Do nothing; the forecast learns."""

    @staticmethod
    def _select(view: SchedulerView) -> int:
        """Return the slowest tier that serves the whole queue within the head's slack."""
        forecast, head = view.forecast, view.queue.by_deadline[0]
        slack_s = head.deadline_s - view.now_s
        seconds = {tier: forecast.p99(tier, full_batch(view, tier)) for tier in head.tiers}
        fitting = [tier for tier in head.tiers if seconds[tier] <= slack_s]
        return max(fitting, key=seconds.__getitem__, default=head.tiers[0])

    @staticmethod
    def _scale(view: SchedulerView, tier: int) -> tuple[int, int]:
        """Return the tier, or the next cheaper one with enough capacity, and its batch limit."""
        forecast, head = view.forecast, view.queue.by_deadline[0]
        load = view.arrivals.rate(view.now_s) / view.devices
        for other in reversed(head.tiers[: head.tiers.index(tier) + 1]):
            for limit in (forecast.useful_batch(other), view.max_batch):
                max_size = min(limit, view.max_batch)
                # a larger batch would exceed the budget
                batch = forecast.largest_batch(other, head.budget_s, max_size)
                if batch and load * forecast.p50(other, batch) <= MAX_UTILISATION * batch:
                    return other, limit
        return head.tiers[0], view.max_batch
