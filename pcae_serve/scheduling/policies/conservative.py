"""Conservative: greedy, limited to half the budget and to tiers that sustain the current load.

The baseline of that name in RAMSIS (Mendoza et al., EuroSys 2024). A request that arrives just
after a batch has started waits for it and still has half of its budget for its own batch. The
throughput of a tier is that of the batch to be run, however small.
"""

from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.policies.greedy import run_most_accurate


class Conservative:
    """Greedy with a limit of half the budget, and enough throughput for the current load."""

    name = "conservative"

    def choose(self, view: SchedulerView) -> Run:
        forecast = view.forecast
        half_s = view.queue.by_deadline[0].budget_s / 2
        load = view.arrivals.rate(view.now_s) / view.devices

        def suits(tier: int, batch: int) -> bool:
            sustains_load = batch >= load * forecast.p50(tier, batch)
            return sustains_load and forecast.p99(tier, batch) <= half_s

        return run_most_accurate(view, suits)

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """Do nothing."""
