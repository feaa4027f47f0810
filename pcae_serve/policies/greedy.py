"""Greedy: the earliest deadline gets the most accurate tier that fits what is left of its budget.

It knows nothing of load: a growing queue eats the budgets, and so pushes the choice down.
"""

from pcae_serve.policies import Request, Run, Situation


class Greedy:
    """Serve the head of the queue, and with it whoever fits into the same batch in time."""

    name = "greedy"

    def choose(self, situation: Situation) -> Run:
        head, *others = situation.waiting
        tier = self._best_tier(head, situation)
        batch = [head]
        limit = min(situation.max_batch, situation.latency.useful_batch(tier))
        for request in others:
            if len(batch) >= limit or not self._fits(situation, tier, len(batch) + 1, head):
                break
            if tier in request.tiers and self._is_best(tier, request, situation):
                batch.append(request)
        return Run(tier, tuple(batch))

    def observe(self, run: Run, seconds: float) -> None:
        """Greedy learns nothing."""

    def _best_tier(self, request: Request, situation: Situation) -> int:
        for tier in reversed(request.tiers):
            if self._fits(situation, tier, 1, request):
                return tier
        return request.tiers[0]

    def _is_best(self, tier: int, request: Request, situation: Situation) -> bool:
        """Nobody is served worse for company: a slacker budget waits for its own batch."""
        return self._best_tier(request, situation) == tier

    @staticmethod
    def _fits(situation: Situation, tier: int, batch: int, request: Request) -> bool:
        done_s = situation.now_s + situation.latency.promised(tier, batch, situation.now_s)
        return done_s <= request.deadline_s
