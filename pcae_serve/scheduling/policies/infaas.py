"""INFaaS: the allowed tier closest below the head's slack, scaled down where the load demands it.

Romero et al., "INFaaS", ATC 2021: selection by query as described there, scaling as Proteus (Ahmad
et al., ASPLOS 2024) models it for machines that cannot be added: a larger batch first, which costs
no accuracy, then a cheaper variant. It knows one head at a time, and nothing of who waits behind.
"""

from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.policies.fixed import batch_in_time
from pcae_serve.scheduling.policies.greedy import full_batch

#: The share of its capacity that a tier is loaded with before the scaler acts.
LOAD = 0.9


class Infaas:
    """Tiers are the variants; all of them are loaded, so that a change costs nothing."""

    name = "infaas"

    def choose(self, view: SchedulerView) -> Run:
        tier, limit = self._scaled(view, self._closest(view))
        batch = batch_in_time(view, tier, limit)
        return Run(tier, tuple(view.queue.allowing(tier)[:batch]))

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """Infaas learns nothing but what the forecast has learnt."""

    @staticmethod
    def _closest(view: SchedulerView) -> int:
        """Of the tiers that serve all who wait within the head's slack, the slowest."""
        forecast, head = view.forecast, view.queue.by_deadline[0]
        slack_s = head.deadline_s - view.now_s
        seconds = {tier: forecast.p99(tier, full_batch(view, tier)) for tier in head.tiers}
        fitting = [tier for tier in head.tiers if seconds[tier] <= slack_s]
        return max(fitting, key=seconds.__getitem__, default=head.tiers[0])

    @staticmethod
    def _scaled(view: SchedulerView, tier: int) -> tuple[int, int]:
        """The tier, or the next cheaper one with the capacity; and its batch limit."""
        forecast, head = view.forecast, view.queue.by_deadline[0]
        load = view.arrivals.rate(view.now_s) / view.devices
        for other in reversed(head.tiers[: head.tiers.index(tier) + 1]):
            for limit in (forecast.useful_batch(other), view.max_batch):
                most = min(limit, view.max_batch)
                batch = forecast.largest(other, head.budget_s, most)  # more would never be in time
                if batch and load * forecast.p50(other, batch) <= LOAD * batch:
                    return other, limit
        return head.tiers[0], view.max_batch
