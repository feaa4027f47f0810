"""Greedy: the most accurate tier that serves the whole queue before the earliest deadline.

The baseline "aggressive" of RAMSIS (Mendoza et al., EuroSys 2024). The arrival rate is not
considered: under load the queue grows, budgets shrink, and so cheaper tiers are chosen.
"""

from collections.abc import Callable

from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.policies.fixed import batch_in_time


class Greedy:
    """All that a batch holds, on the best tier that meets the most urgent deadline."""

    name = "greedy"

    def choose(self, view: SchedulerView) -> Run:
        return run_most_accurate(view, lambda tier, batch: True)

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """Do nothing."""


def run_most_accurate(view: SchedulerView, suits: Callable[[int, int], bool]) -> Run:
    """Run the queue on the most accurate tier that meets the most urgent deadline and suits.

    If there is none: the fastest allowed tier, in the largest batch that meets that deadline.
    """
    queue, forecast = view.queue, view.forecast
    head = queue.by_deadline[0]
    slack_s = head.deadline_s - view.now_s
    for tier in reversed(head.tiers):
        batch = full_batch(view, tier)
        if forecast.p99(tier, batch) <= slack_s and suits(tier, batch):
            break
    else:
        tier = head.tiers[0]
        batch = batch_in_time(view, tier, forecast.useful_batch(tier))
    return Run(tier, tuple(queue.allowing(tier)[:batch]))


def full_batch(view: SchedulerView, tier: int) -> int:
    """Return the number of queued requests that allow the tier, up to its useful batch."""
    useful = view.forecast.useful_batch(tier)
    return min(len(view.queue.allowing(tier)), view.max_batch, useful)
