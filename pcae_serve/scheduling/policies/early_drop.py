"""Early drop: give up the heads that a full batch cannot meet, so that the others get one.

Nexus' batching (Shen et al., "Nexus", SOSP 2019), put around any policy: that one names the tier,
this one makes the batch. It knows nothing of the other tiers on which a head might still have made
it: who is let go is lost, which is the known price of it.
"""

from pcae_serve.scheduling.policies.base import Policy, Run, SchedulerView, Wait
from pcae_serve.scheduling.policies.fixed import Fixed


class EarlyDrop:
    """The inner policy's tier, in batches as large as they are worth filling."""

    def __init__(self, policy: Policy) -> None:
        self._inner = policy
        fixed = isinstance(policy, Fixed)  # that pair is what Nexus itself does
        self.name = policy.name.replace("fixed", "nexus", 1) if fixed else f"{policy.name}+drop"

    def choose(self, view: SchedulerView) -> Run | Wait:
        inner = self._inner.choose(view)
        if isinstance(inner, Wait):
            return inner
        now_s, forecast, tier = view.now_s, view.forecast, inner.tier
        waiting = view.queue.allowing(tier)
        most = min(view.max_batch, forecast.useful_batch(tier))
        for first, head in enumerate(waiting):
            target = min(len(waiting) - first, most)  # fewer are left, and they take less
            if now_s + forecast.p99(tier, target) <= head.deadline_s:
                batch = tuple(waiting[first : first + target])
                return Run(tier, batch, dropped=tuple(waiting[:first]))
        return inner  # nobody can make it for sure: the inner policy's attempt is the best there is

    def observe(self, run: Run, seconds: float, late: int) -> None:
        self._inner.observe(run, seconds, late)
