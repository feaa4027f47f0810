"""Calibration of a bundle's tiers: how sure an answer is, and what a second look at it gains.

Written by the exporter, from images apart from those that report accuracy.
"""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pcae_serve.bundle.quality import Share
from pcae_serve.frozen_model import FrozenModel

#: Groups of images by margin, at most.
MAX_GROUPS = 100
Name = Annotated[str, Field(max_length=100)]


class TierCalibration(FrozenModel):
    """Of one tier: its temperature, and its images in groups of rising margin."""

    temperature: Annotated[float, Field(gt=0, le=1000)]  # logits are divided by it
    #: The largest margin of each group: the probability of the first class minus the second's.
    margins: Annotated[tuple[Share, ...], Field(max_length=MAX_GROUPS)]
    shares: Annotated[tuple[Share, ...], Field(max_length=MAX_GROUPS)]  # of all images, per group

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if len(self.margins) != len(self.shares):
            raise ValueError("margins and shares must have the same length")
        if any(b < a for a, b in pairwise(self.margins)):
            raise ValueError("margins must be in ascending order")
        return self


class SecondLook(FrozenModel):
    """What running an image on `second` gains after `first`, per group of margins of `first`."""

    first: Name
    second: Name
    #: Probability that the answer turns right, minus that it turns wrong; never rises.
    gains: Annotated[tuple[Annotated[float, Field(ge=-1, le=1)], ...], Field(max_length=MAX_GROUPS)]
    lows: Annotated[tuple[Annotated[float, Field(ge=-2, le=2)], ...], Field(max_length=MAX_GROUPS)]
    highs: Annotated[tuple[Annotated[float, Field(ge=-2, le=2)], ...], Field(max_length=MAX_GROUPS)]

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if not len(self.gains) == len(self.lows) == len(self.highs):
            raise ValueError("gains and their intervals must have the same length")
        if any(b > a for a, b in pairwise(self.gains)):
            raise ValueError("gains must not rise with the margin")
        return self


class Calibration(FrozenModel):
    """Of all tiers of a bundle that answers with classes."""

    n: Annotated[int, Field(ge=1)]  # images
    data_set: Annotated[str, Field(max_length=1000)]
    #: What a right answer is: the image's label, or the class of the same model at k = 1.0.
    right: Literal["label", "full"]
    tiers: Annotated[dict[Name, TierCalibration], Field(max_length=100)]
    second_looks: Annotated[tuple[SecondLook, ...], Field(max_length=2000)]

    @property
    def temperatures(self) -> dict[str, float]:
        """Return each tier's temperature."""
        return {name: tier.temperature for name, tier in self.tiers.items()}

    @model_validator(mode="after")
    def _check_tiers(self) -> Self:
        for look in self.second_looks:
            if look.first not in self.tiers or look.second not in self.tiers:
                raise ValueError(f"second look {look.first} -> {look.second}: no such tier")
            if len(look.gains) != len(self.tiers[look.first].margins):
                raise ValueError(f"second look {look.first} -> {look.second}: not a gain per group")
        return self
