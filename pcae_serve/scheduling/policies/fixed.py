"""Fixed: one tier for all requests, in the largest batch that meets the most urgent deadline.

As Clipper-HA (most accurate tier) and Clipper-LA (fastest tier) in the literature; Crankshaw et
al., "Clipper", NSDI 2017. Clipper finds its batch size by trial; here it comes from the forecast.
Load and accuracy are not considered, and no request is dropped.
"""

from itertools import islice

from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.tiers import TierTable

#: Requests examined for the batch of one that does not allow the fixed tier.
LOOKAHEAD = 128


class Fixed:
    """Always the same tier; for a request that does not allow it, the nearest allowed one."""

    def __init__(self, tier_table: TierTable, tier_name: str) -> None:
        self._tier = tier_table.index(tier_name)
        self.name = f"fixed:{tier_name}"

    def choose(self, view: SchedulerView) -> Run:
        return run_at(self._tier, view)

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """Do nothing."""


def run_at(tier: int, view: SchedulerView) -> Run:
    """Run the most urgent request on its tier nearest to `tier`, with others that go there too."""
    actual = nearest(tier, view.queue.by_deadline[0].tiers)
    candidates = islice(view.queue.allowing(actual), LOOKAHEAD)
    same = (request for request in candidates if nearest(tier, request.tiers) == actual)
    size = batch_in_time(view, actual, view.forecast.useful_batch(actual))
    return Run(actual, tuple(islice(same, size)))


def nearest(tier: int, allowed: tuple[int, ...]) -> int:
    """Return `tier`, or the next more accurate allowed one, or else the most accurate allowed."""
    return next((other for other in allowed if other >= tier), allowed[-1])


def batch_in_time(view: SchedulerView, tier: int, limit: int) -> int:
    """Return the largest batch up to `limit` that meets the most urgent deadline; at least 1."""
    queue, forecast = view.queue, view.forecast
    slack_s = queue.by_deadline[0].deadline_s - view.now_s
    max_size = min(limit, view.max_batch, len(queue.allowing(tier)))
    return max(1, forecast.largest_batch(tier, slack_s, max_size))
