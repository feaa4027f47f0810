"""Model-Switching: the load names one tier for everybody, the one of best effective accuracy.

Zhang et al., "Model-Switching", HotCloud 2020. Theirs measures offline, for every load, each
model's effective accuracy: the accuracy of the answers in time. Here the forecast computes it:

    batch     at a load, a device settles on the least batch b that keeps up: load * p50(b) <= b
    in time   who comes right after a batch began waits for it and then for his own, so those whose
              budgets hold 2 * p50(b); nobody where no batch keeps up

It knows loads and budgets as they were, and not what is in the queue.
"""

from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.policies.fixed import run_at
from pcae_serve.scheduling.tiers import TierTable

#: Up again only when the better tier would still be best with the load at this share of it.
HEADROOM = 0.9
#: For so many decisions in a row.
PATIENCE = 16


class ModelSwitching:
    """Down at once, up with patience: a wrong way down costs accuracy, a wrong way up deadlines."""

    name = "model-switching"

    def __init__(self, tier_table: TierTable) -> None:
        self._accuracy = tier_table.accuracy
        self._tier: int | None = None
        self._calm = 0  # decisions in a row in which a better tier would have done

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
        """Model-Switching learns nothing but what the forecast has learnt."""

    def _best(self, view: SchedulerView, load: float) -> int:
        """The tier of best effective accuracy at a load; the fastest where nothing keeps up."""
        best, most = 0, (0.0, 0.0)
        for tier, accuracy in enumerate(self._accuracy):
            effective = accuracy * _in_time(view, tier, load)
            if effective > 0 and (effective, accuracy) > most:
                best, most = tier, (effective, accuracy)
        return best


def _in_time(view: SchedulerView, tier: int, load: float) -> float:
    """The share of requests that a tier answers in time at a load on one device."""
    forecast = view.forecast
    for batch in range(1, min(view.max_batch, forecast.useful_batch(tier)) + 1):
        batch_s = forecast.p50(tier, batch)
        if load * batch_s <= batch:
            classes = view.arrivals.classes
            late = sum(c.share for c in classes if c.budget_s < 2 * batch_s)
            return 1.0 - min(1.0, late)
    return 0.0
