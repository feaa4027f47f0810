"""A bundle's tiers as the scheduler and its policies see them."""

from collections.abc import Sequence

import numpy as np

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.quality import difference_margins
from pcae_serve.scheduling.tiers import TierTable

#: Assumed accuracy of the cheapest and of the best tier, if none was measured.
UNMEASURED = (0.9, 1.0)
#: Largest margin of a difference with which tiers can be called equally accurate. A wider one says
#: that there were too few images; at 50 % accuracy, fewer than about 5,000.
MAX_MARGIN = 0.02


def tier_table(tiers: Sequence[Tier]) -> TierTable:
    """Return the names and accuracies of a bundle's tiers, the cheapest first.

    Agreement with the full model stands in for a missing accuracy. If a tier has neither, or if
    none was better than the cheapest on too few images, all tiers are spaced evenly over ten
    points, about what token reduction usually costs: a wider spacing would make policies give up
    deadlines for accuracy that was never measured.

    Differences count only outside their interval, unless there were too few images.
    """
    names = tuple(tier.name for tier in tiers)
    measured = [tier.quality for tier in tiers if tier.quality is not None]
    accuracy = tuple(min(max(quality, 0.0), 1.0) for quality in measured)
    margins = _margins(tiers, accuracy)
    too_few = _widest(margins) > MAX_MARGIN and max(accuracy) - min(accuracy) <= _widest(margins)
    if len(measured) < len(tiers) or (too_few and max(accuracy) <= accuracy[0]):
        return TierTable(names, tuple(np.linspace(*UNMEASURED, len(tiers)).tolist()))
    return TierTable(names, accuracy, () if too_few else margins)


def _margins(tiers: Sequence[Tier], accuracy: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Return the margins of the differences in accuracy; empty if a tier has no interval."""
    intervals = [tier.quality_interval for tier in tiers]
    known = [interval for interval in intervals if interval is not None]
    return () if len(known) < len(tiers) else difference_margins(accuracy, known)


def _widest(margins: Sequence[Sequence[float]]) -> float:
    return max(map(max, margins), default=0.0)
