"""Conservative: greedy, on tiers that take half the budget at most and keep up with the load.

The baseline of that name of RAMSIS (Mendoza et al., EuroSys 2024). It knows the load that there is,
not the one to come, and counts as throughput that of the batch at hand, however small it is.
"""

from pcae_serve.scheduling.policies.base import Run, Situation
from pcae_serve.scheduling.policies.greedy import run_highest


class Conservative:
    """Who comes right after a batch has begun waits for all of it, and still has his own half."""

    name = "conservative"

    def choose(self, situation: Situation) -> Run:
        forecast = situation.forecast
        half_s = situation.queue.by_deadline[0].budget_s / 2
        load = situation.arrivals.rate(situation.now_s) / situation.devices

        def suits(tier: int, batch: int) -> bool:
            keeps_up = batch >= load * forecast.typical(tier, batch)
            return keeps_up and forecast.promised(tier, batch) <= half_s

        return run_highest(situation, suits)

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """Conservative learns nothing."""
