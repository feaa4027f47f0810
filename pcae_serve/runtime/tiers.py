"""A bundle's tiers as the scheduler and its policies see them."""

from collections.abc import Sequence

import numpy as np

from pcae_serve.bundle.manifest import Tier
from pcae_serve.scheduling.tiers import TierTable

#: Assumed accuracy of the cheapest and of the best tier, if none was measured.
UNMEASURED = (0.9, 1.0)


def tier_table(tiers: Sequence[Tier]) -> TierTable:
    """Return the names and accuracies of a bundle's tiers, the cheapest first.

    Agreement with the full model stands in for a missing accuracy. If a tier has neither, all
    tiers are spaced evenly over ten points, about what token reduction usually costs: a wider
    spacing would make policies give up deadlines for accuracy that was never measured.
    """
    measured = [tier.quality for tier in tiers if tier.quality is not None]
    if len(measured) < len(tiers):
        measured = np.linspace(*UNMEASURED, len(tiers)).tolist()
    accuracy = tuple(min(max(quality, 0.0), 1.0) for quality in measured)
    return TierTable(tuple(tier.name for tier in tiers), accuracy)
