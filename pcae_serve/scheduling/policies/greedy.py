"""Greedy: the most accurate tier that serves all who wait before the earliest deadline.

The "aggressive" baseline of RAMSIS (Mendoza et al., EuroSys 2024). It knows nothing of load: a
growing queue eats the budgets, and so pushes the choice down.
"""

from collections.abc import Callable

from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.policies.fixed import batch_in_time


class Greedy:
    """All that a batch holds, on the best tier that is quick enough for the head."""

    name = "greedy"

    def choose(self, view: SchedulerView) -> Run:
        return run_highest(view, lambda tier, batch: True)

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """Greedy learns nothing."""


def run_highest(view: SchedulerView, suits: Callable[[int, int], bool]) -> Run:
    """The head's most accurate tier that fits and suits; else its fastest, with whom that fits."""
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
    """All who wait and allow the tier, as far as a batch is worth filling."""
    useful = view.forecast.useful_batch(tier)
    return min(len(view.queue.allowing(tier)), view.max_batch, useful)
