"""Choose the most accurate tier that finishes a number of images in time, again for each batch.

A tier that has run is predicted by how long its images took, decoding included; another one by its
latency, plus what the images of other tiers took beyond theirs. The plan has no clock.
"""

import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

#: Weight of the newest batch in the seconds per image of its tier.
WEIGHT = 0.3
#: Share of the time left that is planned with.
PLANNED = 0.97

_NUMBER = r"(\d+(?:\.\d+)?)"
_DURATION = re.compile(rf"(?:{_NUMBER}h)?(?:{_NUMBER}m(?:in)?)?(?:{_NUMBER}s)?")
_UNITS_S = (3600.0, 60.0, 1.0)


class _Choice(NamedTuple):
    """What was chosen for a batch, and when."""

    tier: int
    at_s: float
    left: int


class TimePlan:
    """Chooses a tier for the next batch, from what the batches before took."""

    def __init__(
        self,
        tiers: Sequence[int],
        accuracy: Sequence[float],
        image_s: Mapping[int, float],
        end_s: float,
        parallel: int = 1,
    ) -> None:
        """Plan to be done at `end_s`.

        tiers: allowed, the cheapest first. accuracy: of all tiers. image_s: predicted seconds per
        image of each allowed tier, without decoding. parallel: batches that run at the same time;
        those that began together end together, so the time of that many counts.
        """
        self._tiers = sorted(tiers, key=lambda tier: (accuracy[tier], -tier), reverse=True)
        self._cheapest = tiers[0]
        self._predicted, self._measured = image_s, dict[int, float]()
        self._beyond_s = 0.0  # of an image, beyond its tier's latency
        self._end_s = end_s
        self._start: int | None = None  # images left at the first choice
        self._parallel = parallel
        self._choices = deque[_Choice](maxlen=parallel)

    def choose(self, now_s: float, left: int) -> int:
        """Return the tier of the next batch. left: images that are not done, those in it included.

        If no tier is fast enough, return the cheapest.
        """
        if self._settled(left):
            first = self._choices[0]
            self._learn(first.tier, (now_s - first.at_s) / (first.left - left))
        time_s = PLANNED * (self._end_s - now_s)
        fits = (tier for tier in self._tiers if self.image_s(tier) * left <= time_s)
        chosen = next(fits, self._cheapest)
        if self._start is None:
            self._start = left
        self._choices.append(_Choice(chosen, now_s, left))
        return chosen

    def _settled(self, left: int) -> bool:
        """Return whether the last choices were one tier's, and made while all batches ran."""
        choices = self._choices
        if len(choices) < self._parallel or choices[0].left <= left:
            return False
        began = self._parallel > 1 and choices[0].left == self._start
        return not began and len({choice.tier for choice in choices}) == 1

    def image_s(self, tier: int) -> float:
        """Return the seconds that an image is expected to take."""
        return self._measured.get(tier, self._predicted[tier] + self._beyond_s)

    def late_s(self, now_s: float, left: int) -> float:
        """Return by how many seconds even the cheapest tier is too slow; 0 if it is not."""
        return max(0.0, self.image_s(self._cheapest) * left - (self._end_s - now_s))

    def _learn(self, tier: int, image_s: float) -> None:
        before = self._measured.get(tier, image_s)
        self._measured[tier] = before + WEIGHT * (image_s - before)
        self._beyond_s = max(0.0, self._measured[tier] - self._predicted[tier])


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as 90, 90s, 10m or 1h30m. Raises ValueError."""
    text = text.strip().lower()
    if re.fullmatch(_NUMBER, text):
        text += "s"
    match = _DURATION.fullmatch(text)
    numbers = match.groups(default="0") if match else ()
    seconds = sum(float(n) * unit for n, unit in zip(numbers, _UNITS_S, strict=False))
    if seconds <= 0:
        raise ValueError(f"{text!r} is not a duration such as 90s, 10m or 1h30m")
    return seconds
