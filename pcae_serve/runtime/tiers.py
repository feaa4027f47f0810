"""A bundle's tiers as the scheduler and its policies see them."""

from collections.abc import Sequence

import numpy as np

from pcae_serve.bundle.calibration import Calibration
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.quality import difference_margins
from pcae_serve.scheduling.escalation import Escalation, Step
from pcae_serve.scheduling.tiers import TierTable

#: Assumed accuracy of the cheapest and of the best tier, if none was measured.
UNMEASURED = (0.9, 1.0)
#: Largest margin of a difference with which tiers can be called equally accurate. A wider one says
#: that there were too few images; at 50 % accuracy, fewer than about 5,000.
MAX_MARGIN = 0.02
#: The gains of second looks are scaled down to this share, at most.
LEAST_SCALE = 0.5


def escalations(
    names: Sequence[str], accuracy: Sequence[float], calibration: Calibration | None
) -> tuple[Escalation, ...]:
    """Return what second looks gain between the tiers with these names, the cheapest first.

    Gains are scaled down, if necessary, so that running every image again gains no more than what
    the tiers' accuracies differ by, which were measured on other images: a second look must not
    look better than a better first one by chance.
    """
    found = list[Escalation]()
    for look in () if calibration is None else calibration.second_looks:
        if calibration is None or not {look.first, look.second} <= set(names):
            continue
        first, second, groups = names.index(look.first), names.index(look.second), calibration.tiers
        margins, shares = groups[look.first].margins, groups[look.first].shares
        of_all = sum(share * gain for share, gain in zip(shares, look.gains, strict=True))
        more = accuracy[second] - accuracy[first]
        scale = min(1.0, max(more / of_all, LEAST_SCALE)) if of_all > 0 else 1.0
        steps = [
            Step(margin, share, scale * gain)
            for margin, share, gain in zip(margins, shares, look.gains, strict=True)
            if gain > 0
        ]
        if steps:
            found.append(Escalation(first, second, tuple(steps)))
    return tuple(found)


def tier_table(tiers: Sequence[Tier], calibration: Calibration | None = None) -> TierTable:
    """Return names, accuracies and second looks of a bundle's tiers, the cheapest first.

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
        accuracy, margins = tuple(np.linspace(*UNMEASURED, len(tiers)).tolist()), ()
    looks = escalations(names, accuracy, calibration)
    return TierTable(names, accuracy, () if too_few else margins, looks)


def _margins(tiers: Sequence[Tier], accuracy: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Return the margins of the differences in accuracy; empty if a tier has no interval."""
    intervals = [tier.quality_interval for tier in tiers]
    known = [interval for interval in intervals if interval is not None]
    return () if len(known) < len(tiers) else difference_margins(accuracy, known)


def _widest(margins: Sequence[Sequence[float]]) -> float:
    return max(map(max, margins), default=0.0)
