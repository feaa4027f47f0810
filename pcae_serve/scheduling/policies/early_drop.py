"""Early drop: drop the most urgent requests if a full batch would make them late.

The batching of Nexus (Shen et al., SOSP 2019) around any policy: the inner policy chooses the tier,
early drop the batch. A dropped request is lost even if another tier could have answered it in time.
"""

from pcae_serve.scheduling.policies.base import Policy, Run, SchedulerView, Wait
from pcae_serve.scheduling.policies.fixed import Fixed


class EarlyDrop:
    """The inner policy's tier, with batches as large as useful."""

    def __init__(self, policy: Policy) -> None:
        self._inner = policy
        fixed = isinstance(policy, Fixed)  # fixed with early drop is Nexus itself
        self.name = policy.name.replace("fixed", "nexus", 1) if fixed else f"{policy.name}+drop"

    def choose(self, view: SchedulerView) -> Run | Wait:
        inner = self._inner.choose(view)
        if isinstance(inner, Wait):
            return inner
        now_s, forecast, tier = view.now_s, view.forecast, inner.tier
        waiting = view.queue.allowing(tier)
        max_size = min(view.max_batch, forecast.useful_batch(tier))
        for first, head in enumerate(waiting):
            size = min(len(waiting) - first, max_size)  # smaller, and faster, with fewer left
            if now_s + forecast.p99(tier, size) <= head.deadline_s:
                batch = tuple(waiting[first : first + size])
                return Run(tier, batch, dropped=tuple(waiting[:first]))
        return inner  # no request is certain to be in time

    def observe(self, run: Run, seconds: float, late: int) -> None:
        self._inner.observe(run, seconds, late)
