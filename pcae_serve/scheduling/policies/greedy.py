"""Greedy: the most accurate tier that serves all who wait before the earliest deadline.

The "aggressive" baseline of RAMSIS (Mendoza et al., EuroSys 2024). It knows nothing of load: a
growing queue eats the budgets, and so pushes the choice down.
"""

from collections.abc import Callable

from pcae_serve.scheduling.policies.base import Run, Situation
from pcae_serve.scheduling.policies.fixed import batch_in_time


class Greedy:
    """All that a batch holds, on the best tier that is quick enough for the head."""

    name = "greedy"

    def choose(self, situation: Situation) -> Run:
        return run_highest(situation, lambda tier, batch: True)

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """Greedy learns nothing."""


def run_highest(situation: Situation, suits: Callable[[int, int], bool]) -> Run:
    """The head's most accurate tier that fits and suits; else its fastest, with whom that fits."""
    queue, forecast = situation.queue, situation.forecast
    head = queue.by_deadline[0]
    slack_s = head.deadline_s - situation.now_s
    for tier in reversed(head.tiers):
        batch = full_batch(situation, tier)
        if forecast.promised(tier, batch) <= slack_s and suits(tier, batch):
            break
    else:
        tier = head.tiers[0]
        batch = batch_in_time(situation, tier, forecast.useful_batch(tier))
    return Run(tier, tuple(queue.allowing(tier)[:batch]))


def full_batch(situation: Situation, tier: int) -> int:
    """All who wait and allow the tier, as far as a batch is worth filling."""
    useful = situation.forecast.useful_batch(tier)
    return min(len(situation.queue.allowing(tier)), situation.max_batch, useful)
