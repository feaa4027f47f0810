"""How good a tier is, as the exporter measured it: what stands in a bundle and under /tiers.

It knows figures and where they come from, neither files nor images: clients read it too, and light.
"""

from math import sqrt
from typing import Annotated

from pydantic import Field

from pcae_serve.frozen_model import FrozenModel

#: The 97.5 % quantile of the standard normal distribution.
Z_95 = 1.959963984540054

Share = Annotated[float, Field(ge=0, le=1)]


class Accuracy(FrozenModel):
    """Top-1 on labelled images, measured through the exported graph."""

    top1: Share
    n: Annotated[int, Field(ge=1)]
    interval: tuple[Share, Share]  # 95 %, Wilson
    data_set: str


class Agreement(FrozenModel):
    """Share of images where the tier's top-1 is that of k = 1.0, where no labels were at hand."""

    share: Share
    n: Annotated[int, Field(ge=1)]
    data_set: str


class Fidelity(FrozenModel):
    """Mean cosine of the tier's features to those of k = 1.0, where there is no head to agree."""

    cosine: Annotated[float, Field(ge=-1, le=1)]
    n: Annotated[int, Field(ge=1)]
    data_set: str


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of n independent trials, within 0 and 1."""
    z2 = Z_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)
