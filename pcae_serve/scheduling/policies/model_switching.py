"""Model-Switching: one tier for all requests, with the best effective accuracy at the load.

Zhang et al., "Model-Switching", HotCloud 2020. The paper measures each model's effective accuracy
(the accuracy of the answers in time) offline for every load; here it is computed from the forecast:

    batch     a device settles on the smallest batch b that sustains the load: load * p50(b) <= b
    in time   a request that arrives just after a batch has started waits for it and then for its
              own: the share of budgets >= 2 * p50(b), or 0 if no batch sustains the load

Load and budgets are those of past requests; the queue is not considered.
"""

from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.policies.fixed import run_at
from pcae_serve.scheduling.tiers import TierTable

#: A better tier must still be best at the load divided by this.
HEADROOM = 0.9
#: Consecutive decisions in favour of a better tier before it is used.
PATIENCE = 16


class ModelSwitching:
    """Switches down at once and up with patience: a wrong step up costs deadlines."""

    name = "model-switching"

    def __init__(self, tier_table: TierTable) -> None:
        self._accuracy = tier_table.accuracy
        self._tier: int | None = None
        self._calm = 0  # consecutive decisions in favour of a better tier

    def choose(self, view: SchedulerView) -> Run:
        load = view.arrivals.rate(view.now_s) / view.devices
        best = self._best(view, load)
        if self._tier is not None and best > self._tier:
            best = max(self._tier, self._best(view, load / HEADROOM))
        self._calm = self._calm + 1 if self._tier is not None and best > self._tier else 0
        if self._tier is None or best < self._tier or self._calm >= PATIENCE:
            self._tier, self._calm = best, 0
        return run_at(self._tier, view)

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """Do nothing; the forecast learns."""

    def _best(self, view: SchedulerView, load: float) -> int:
        """Return the tier of best effective accuracy at a load; the fastest if none sustains it."""
        best, best_score = 0, (0.0, 0.0)
        for tier, accuracy in enumerate(self._accuracy):
            effective = accuracy * _share_in_time(view, tier, load)
            if effective > 0 and (effective, accuracy) > best_score:
                best, best_score = tier, (effective, accuracy)
        return best


def _share_in_time(view: SchedulerView, tier: int, load: float) -> float:
    """Return the share of requests that a tier answers in time at a load on one device."""
    forecast = view.forecast
    for batch in range(1, min(view.max_batch, forecast.useful_batch(tier)) + 1):
        batch_s = forecast.p50(tier, batch)
        if load * batch_s <= batch:
            classes = view.arrivals.classes
            late = sum(c.share for c in classes if c.budget_s < 2 * batch_s)
            return 1.0 - min(1.0, late)
    return 0.0
