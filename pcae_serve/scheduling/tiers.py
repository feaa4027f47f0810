"""Table of a bundle's tiers: names and accuracies, cheapest first."""

from collections.abc import Mapping
from dataclasses import dataclass

from pcae_serve.errors import StartError
from pcae_serve.scheduling.escalation import Escalation


@dataclass(frozen=True)
class TierTable:
    """Tier i has names[i] and accuracy[i]; the order is the bundle's.

    margin[i][j] is what tier i has to be better by than tier j for the difference to lie outside
    its 95 % interval; without margins, accuracies are exact.
    """

    names: tuple[str, ...]
    accuracy: tuple[float, ...]  # 0..1; agreement with the full model if accuracy is not measured
    margin: tuple[tuple[float, ...], ...] = ()
    escalations: tuple[Escalation, ...] = ()  # what second looks gain; empty: unknown

    def index(self, name: str) -> int:
        """Return the position of the tier with this name. Raise StartError if there is none."""
        if name not in self.names:
            raise StartError(f"no tier is named {name!r}; the tiers are {', '.join(self.names)}")
        return self.names.index(name)

    def counted(self, tiers: tuple[int, ...]) -> Mapping[int, float]:
        """Return the accuracy that each of `tiers` counts with if waiting has a price.

        From the most accurate tier down, each tier is represented by the cheapest one that is as
        accurate within the interval of their difference.
        """
        counted, rest = dict[int, float](), sorted(tiers)
        while rest:
            best = max(rest, key=lambda tier: self.accuracy[tier])
            place = next(i for i, tier in enumerate(rest) if not self._exceeds(best, tier))
            level = self.accuracy[rest[place]]
            counted |= {tier: min(level, self.accuracy[tier]) for tier in rest[place:]}
            rest = rest[:place]
        return counted

    def _exceeds(self, better: int, other: int) -> bool:
        """Return whether a tier is more accurate, the interval of the difference considered."""
        margin = self.margin[better][other] if self.margin else 0.0
        return self.accuracy[better] - self.accuracy[other] > margin
