"""The measured quality of a tier, as stored in a bundle and returned by /tiers.

Clients import this module, so it needs only pydantic.
"""

from collections.abc import Sequence
from math import hypot, sqrt
from typing import Annotated

from pydantic import Field

from pcae_serve.frozen_model import FrozenModel

#: The 97.5 % quantile of the standard normal distribution.
Z_95 = 1.959963984540054

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, description="number of images")]
DataSet = Annotated[str, Field(description="where the images are from")]


class Accuracy(FrozenModel):
    """Top-1 accuracy on labelled images, measured with the exported graph."""

    top1: Share = Field(description="share of images whose first class is right")
    n: Count
    interval: tuple[Share, Share] = Field(description="95 % interval of top1 (Wilson)")
    data_set: DataSet


class Agreement(FrozenModel):
    """Share of images with the same top-1 class as at k = 1.0; used without labels."""

    share: Share
    n: Count
    data_set: DataSet


class Fidelity(FrozenModel):
    """Mean cosine of the tier's features to those at k = 1.0; used without a head."""

    cosine: Annotated[float, Field(ge=-1, le=1)]
    n: Count
    data_set: DataSet


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of n independent trials, within 0 and 1."""
    z2 = Z_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def difference_margins(
    shares: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> tuple[tuple[float, ...], ...]:
    """Return by how much share i must exceed share j to exceed it outside the 95 % interval.

    intervals: Wilson's, of each share. The interval of the difference is Newcombe's (1998, method
    10), which takes the two shares as independent. Tiers are measured on the same images, so that
    the true interval is narrower: a difference that counts here is real.
    """
    below = [share - low for share, (low, _) in zip(shares, intervals, strict=True)]
    above = [high - share for share, (_, high) in zip(shares, intervals, strict=True)]
    return tuple(tuple(hypot(down, up) for up in above) for down in below)
