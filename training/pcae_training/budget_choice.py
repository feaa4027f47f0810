"""Which keep ratios a training step runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from pcae_training.sample_rng import SampleRng
from pcae_training.schedule import lowest_keep_ratio


@dataclass(frozen=True)
class BudgetChoice:
    """The keep ratios of each step, drawn from those that the ramp allows.

    sandwich: the largest, the smallest and `between` others; one: a single one.
    """

    ramp: Sequence[float]  # all keep ratios that occur, from 1.0 down
    budgets: Sequence[float]  # those to train for, from the largest
    ramp_start: float = 0.0  # share of the run before anything is dropped
    ramp_length: float = 0.0  # share of the run over which the drop ratio rises
    one: bool = False
    between: int = 1
    single: bool = False  # train for the last of `ramp` alone, which the run goes down to
    #: By keep ratio; what is left of 1 is shared equally by the others.
    probabilities: Mapping[float, float] = field(default_factory=dict)

    def allowed(self, progress: float) -> list[float]:
        """Return the keep ratios that a step may run at `progress` in [0, 1], from the largest."""
        lowest = lowest_keep_ratio(self.ramp, progress, self.ramp_start, self.ramp_length)
        if self.single:
            return [lowest]
        allowed = [ratio for ratio in self.ramp if ratio >= lowest and ratio in self.budgets]
        return allowed or [lowest]

    def draw(self, rng: SampleRng, progress: float) -> list[float]:
        """Return the keep ratios of a step, from the largest; the same in every process."""
        allowed = self.allowed(progress)
        if self.one:
            return [self._pick(allowed, rng.draw_shared("budget"))]
        inner = allowed[1:-1]
        chosen = {allowed[0], allowed[-1]}
        for i in range(min(self.between, len(inner))):
            ratio = self._pick(inner, rng.draw_shared(f"budget {i}"))
            inner.remove(ratio)
            chosen.add(ratio)
        return sorted(chosen, reverse=True)

    def odds(self, ratios: Sequence[float]) -> list[float]:
        """Return the probability of each of `ratios`, if one of them is drawn."""
        rest = [ratio for ratio in self.budgets if ratio not in self.probabilities]
        left = 1 - sum(self.probabilities.values())
        share = {ratio: left / len(rest) for ratio in rest} | dict(self.probabilities)
        odds = [share.get(ratio, 0.0) for ratio in ratios]
        total = sum(odds)
        return [odd / total for odd in odds] if total > 0 else [1 / len(ratios)] * len(ratios)

    def macs(self, costs: Mapping[float, float], progress: float) -> float:
        """Return the expected cost of a step's forward passes, from that of each keep ratio."""
        allowed = self.allowed(progress)
        if self.one or len(allowed) == 1:
            return self._mean(costs, allowed)
        inner = allowed[1:-1]
        between = min(self.between, len(inner)) * self._mean(costs, inner) if inner else 0.0
        return costs[allowed[0]] + costs[allowed[-1]] + between

    def _mean(self, costs: Mapping[float, float], ratios: Sequence[float]) -> float:
        if not self.probabilities:
            return fmean(costs[ratio] for ratio in ratios)
        pairs = zip(ratios, self.odds(ratios), strict=True)
        return sum(costs[ratio] * odd for ratio, odd in pairs)

    def _pick(self, ratios: Sequence[float], number: float) -> float:
        """Return one of `ratios`, by a number in [0, 1)."""
        if not self.probabilities:
            return ratios[int(number * len(ratios))]
        for ratio, odd in zip(ratios, self.odds(ratios), strict=True):
            number -= odd
            if number < 0:
                return ratio
        return ratios[-1]  # rounding
