"""Margins of simulated answers, drawn from a bundle's calibration, and what second looks gain."""

from bisect import bisect_left
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from pcae_serve.loadtest.simulator import Outcome
from pcae_serve.scheduling.escalation import Escalation
from pcae_serve.scheduling.tiers import TierTable

#: Margin of an image that no second look gains anything for.
CERTAIN = 1.0


class DrawnLooks:
    """How unsure the answers to n images are: a rank each, the same on every tier."""

    def __init__(self, tier_table: TierTable, n: int, seed: int) -> None:
        self._tier_table = tier_table
        self._ranks: list[float] = np.random.Generator(np.random.PCG64(seed)).random(n).tolist()
        # by first tier: the escalation with the most steps, and the share of images up to each
        self._steps: dict[int, tuple[Escalation, list[float]]] = {}
        for each in tier_table.escalations:
            known = self._steps.get(each.first)
            if known is None or len(known[0].steps) < len(each.steps):
                self._steps[each.first] = each, list(accumulate(s.share for s in each.steps))

    def margin(self, id_: int, tier: int) -> float:
        """Return the margin of an image's answer on a tier."""
        if tier not in self._steps:
            return CERTAIN
        escalation, shares = self._steps[tier]
        place = bisect_left(shares, self._ranks[id_])
        return escalation.steps[place].margin if place < len(shares) else CERTAIN

    def accuracy(self, outcome: Outcome) -> NDArray[np.float64]:
        """Return the expected accuracy [n] of each answer: its first tier's, and the gain."""
        known = np.array(self._tier_table.accuracy)
        first = outcome.tier if outcome.first is None else outcome.first
        accuracy: NDArray[np.float64] = known[first]
        gains = {(each.first, each.second): each for each in self._tier_table.escalations}
        for id_ in np.nonzero(first != outcome.tier)[0].tolist():
            pair = int(first[id_]), int(outcome.tier[id_])
            accuracy[id_] += gains[pair].gain(self.margin(id_, pair[0]))
        return accuracy
