"""Conservative: greedy, on tiers that take half the budget at most and keep up with the load.

The baseline of that name of RAMSIS (Mendoza et al., EuroSys 2024). It knows the load that there is,
not the one to come, and counts as throughput that of the batch at hand, however small it is.
"""

from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.policies.greedy import run_highest


class Conservative:
    """Who comes right after a batch has begun waits for all of it, and still has his own half."""

    name = "conservative"

    def choose(self, view: SchedulerView) -> Run:
        forecast = view.forecast
        half_s = view.queue.by_deadline[0].budget_s / 2
        load = view.arrivals.rate(view.now_s) / view.devices

        def suits(tier: int, batch: int) -> bool:
            keeps_up = batch >= load * forecast.p50(tier, batch)
            return keeps_up and forecast.p99(tier, batch) <= half_s

        return run_highest(view, suits)

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """Conservative learns nothing."""
