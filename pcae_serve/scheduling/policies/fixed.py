"""Fixed: one tier for everybody, in the largest batch that the head of the queue still meets.

What Clipper-HA (the best tier) and Clipper-LA (the fastest) stand for in the literature: Crankshaw
et al., "Clipper", NSDI 2017. Clipper finds its batch by trying; here the forecast tells it. Fixed
knows nothing of load and accuracy, and gives nobody up.
"""

from itertools import islice

from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.tiers import TierTable

#: Requests looked at for company where the head had to go to another tier than the fixed one.
LOOK = 128


class Fixed:
    """Always this tier; where a request does not allow it, the nearest that it does."""

    def __init__(self, tier_table: TierTable, tier_name: str) -> None:
        self._tier = tier_table.index(tier_name)
        self.name = f"fixed:{tier_name}"

    def choose(self, view: SchedulerView) -> Run:
        return run_at(self._tier, view)

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """Fixed learns nothing."""


def run_at(tier: int, view: SchedulerView) -> Run:
    """The head on its nearest to `tier`, and with it the next of those who would go there too."""
    actual = nearest(tier, view.queue.by_deadline[0].tiers)
    near = islice(view.queue.allowing(actual), LOOK)
    alike = (request for request in near if nearest(tier, request.tiers) == actual)
    size = batch_in_time(view, actual, view.forecast.useful_batch(actual))
    return Run(actual, tuple(islice(alike, size)))


def nearest(tier: int, allowed: tuple[int, ...]) -> int:
    """`tier` or the next more accurate that is allowed; where there is none, the most accurate."""
    return next((other for other in allowed if other >= tier), allowed[-1])


def batch_in_time(view: SchedulerView, tier: int, limit: int) -> int:
    """The largest batch up to `limit` that the head still meets; at least the head alone."""
    queue, forecast = view.queue, view.forecast
    slack_s = queue.by_deadline[0].deadline_s - view.now_s
    most = min(limit, view.max_batch, len(queue.allowing(tier)))
    return max(1, forecast.largest(tier, slack_s, most))
