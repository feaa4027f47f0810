"""Decide which tiers are dominated, and whether there were enough images to distinguish them.

Two tiers are compared on the same images. A tier is dominated if a cheaper one is better and the
95 % interval of their difference excludes zero; a tie keeps the larger keep ratio.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil

from pcae_export.measure import Measured, mean_interval
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.quality import Accuracy, Agreement, Fidelity
from pcae_training.score import Difference

#: A difference that matters: one point of accuracy or agreement, or 0.01 of a cosine.
RESOLUTION = 0.01

_FIELDS = {Accuracy: "accuracy", Agreement: "agreement", Fidelity: "fidelity"}


@dataclass(frozen=True)
class Gain:
    """How much better a tier is than a cheaper one, with a 95 % interval, paired by image."""

    value: float
    interval: tuple[float, float]
    n: int

    @classmethod
    def between(cls, tier: Measured, cheaper: Measured) -> "Gain":
        """Compare two tiers that were measured on the same images."""
        one, other = tier.scores, cheaper.scores
        if len(one) != len(other):
            raise ValueError(f"{len(one)} scores cannot be paired with {len(other)}")
        if isinstance(tier.quality, Fidelity):
            return cls(float((one - other).mean()), mean_interval(one - other), len(one))
        difference = Difference(int((one > other).sum()), int((one < other).sum()), len(one))
        return cls(difference.value, difference.interval, len(one))

    @property
    def is_loss(self) -> bool:
        """Whether the cheaper tier is better beyond the uncertainty."""
        return self.interval[1] < 0

    @property
    def images_needed(self) -> int:
        """Return the number of images that shows a difference of RESOLUTION; `n` if it is shown."""
        low, high = self.interval
        if not low <= 0 <= high:
            return self.n
        return ceil(self.n * max(1.0, (high - low) / 2 / RESOLUTION) ** 2)


def rank_tiers(tiers: list[Tier], measured: Mapping[str, Measured]) -> list[Tier]:
    """Return the tiers in the same order, cheapest first, with quality and `dominated` set."""
    ranked = []
    for index, tier in enumerate(tiers):
        found = measured.get(tier.name)
        if found is None:
            ranked.append(tier)
            continue
        gains = [Gain.between(found, other) for _, other in _rivals(tier, tiers[:index], measured)]
        changes = {
            _FIELDS[type(found.quality)]: found.quality,
            "dominated": any(gain.is_loss for gain in gains),
        }
        ranked.append(tier.model_copy(update=changes))
    return ranked


def warn_of_few_images(tiers: list[Tier], measured: Mapping[str, Measured]) -> str | None:
    """Return a warning if there were too few images to distinguish tiers, else None."""
    unclear = []
    for index, tier in enumerate(tiers):
        rivals = list(_rivals(tier, tiers[:index], measured))
        if tier.name not in measured or not rivals:
            continue
        name, cheaper = rivals[-1]
        gain = Gain.between(measured[tier.name], cheaper)
        if gain.images_needed > gain.n:
            unclear.append((gain.images_needed, name, tier.name))
    if not unclear:
        return None
    needed = max(images for images, *_ in unclear)
    pairs = ", ".join(f"{cheaper} and {dearer}" for _, cheaper, dearer in unclear)
    [n] = {len(found.scores) for found in measured.values()}
    kind = type(next(iter(measured.values())).quality)
    what = "0.01 of a cosine" if kind is Fidelity else "one point"
    return (
        f"{n:,} images are too few to distinguish these tiers: {pairs}; about"
        f" {_rounded(needed):,} show a difference of {what}"
    )


def _rivals(
    tier: Tier, cheaper: list[Tier], measured: Mapping[str, Measured]
) -> Iterator[tuple[str, Measured]]:
    """Yield the cheaper tiers that `tier` can be compared with, the cheapest first.

    Without labels these are tiers of the same model, because the scores compare with that model at
    keep ratio 1.
    """
    for other in cheaper:
        found = measured.get(other.name)
        if found is not None and (isinstance(found.quality, Accuracy) or other.model == tier.model):
            yield other.name, found


def _rounded(number: int) -> int:
    """Return a number rounded up to two digits."""
    unit: int = 10 ** max(0, len(str(number)) - 2)
    return int(ceil(number / unit) * unit)
