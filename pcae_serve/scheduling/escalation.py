"""What a second look gains: running an image again on a better tier, by the first answer's margin.

The margin is the probability of the first answer's class minus that of the second one. A small
margin says that the answer may be wrong.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pcae_serve.scheduling.latency import Forecast

#: Share of a device that first and second looks may take together.
MAX_BUSY = 1.0
#: A smaller gain is none: a better first look gains more for the same time.
LEAST_GAIN = 0.02


@dataclass(frozen=True, slots=True)
class Step:
    """Images of similar margin."""

    margin: float  # the largest of the step
    share: float  # of all images
    gain: float  # probability that the answer turns right, minus that it turns wrong


@dataclass(frozen=True)
class Escalation:
    """The gain of running an image on tier `second` after tier `first`."""

    first: int
    second: int
    steps: tuple[Step, ...]  # margins ascending, gains not rising; no gain beyond the last

    def gain(self, margin: float) -> float:
        """Return the expected gain of a second look at an image whose answer has this margin."""
        place = bisect_left(self._margins, margin)
        return self.steps[place].gain if place < len(self.steps) else 0.0

    @cached_property
    def _margins(self) -> list[float]:
        return [step.margin for step in self.steps]


@dataclass(frozen=True, slots=True)
class LookPlan:
    """How much second looks gain if they get a share of a device."""

    second: int  # the tier that gains most
    gain: float  # per image of the first tier
    price_per_s: float  # gain that a device second must bring; 0 if the share is enough for all


class Escalations:
    """All escalations of a bundle, by first tier."""

    def __init__(self, escalations: Sequence[Escalation]) -> None:
        self._by_first: dict[int, list[Escalation]] = {}
        for each in escalations:
            self._by_first.setdefault(each.first, []).append(each)

    def __bool__(self) -> bool:
        return bool(self._by_first)

    def gains(self, first: int, margin: float, tiers: Sequence[int]) -> dict[int, float]:
        """Return what a second look on each of `tiers` gains, those that gain nothing left out."""
        return {
            each.second: gain
            for each in self._by_first.get(first, ())
            if each.second in tiers and (gain := each.gain(margin)) >= LEAST_GAIN
        }

    def plan(
        self, first: int, tiers: Sequence[int], forecast: Forecast, rate: float, first_s: float
    ) -> LookPlan | None:
        """Return the plan that gains most, or None if no second look gains anything.

        rate: images per second that tier `first` answers, at `first_s` each. What is left of
        MAX_BUSY goes to second looks on one of `tiers`, at the smallest margins first.
        """
        best: LookPlan | None = None
        for escalation in self._by_first.get(first, ()):
            if escalation.second not in tiers:
                continue
            image_s = forecast.p50(escalation.second, 1)
            left, gain, price_per_s = max(0.0, MAX_BUSY - rate * first_s), 0.0, 0.0
            for step in escalation.steps:
                if step.gain < LEAST_GAIN:
                    break
                needed = rate * step.share * image_s
                if needed > left:
                    gain += step.share * step.gain * left / needed
                    price_per_s = step.gain / image_s
                    break
                gain += step.share * step.gain
                left -= needed
            if best is None or gain > best.gain:
                best = LookPlan(escalation.second, gain, price_per_s)
        return best
