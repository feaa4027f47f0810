"""How good a tier is, as the exporter measured it: what stands in a bundle and under /tiers.

It knows figures and where they come from, neither files nor images: clients read it too, and light.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Accuracy(_Part):
    """Top-1 on labelled images, measured through the exported graph."""

    top1: Share
    n: Annotated[int, Field(ge=1)]
    interval: tuple[Share, Share]  # 95 %, Wilson
    data_set: str


class Agreement(_Part):
    """Share of images where the tier's top-1 is that of k = 1.0, where no labels were at hand."""

    share: Share
    n: Annotated[int, Field(ge=1)]
    data_set: str


class Fidelity(_Part):
    """Mean cosine of the tier's features to those of k = 1.0, where there is no head to agree."""

    cosine: Annotated[float, Field(ge=-1, le=1)]
    n: Annotated[int, Field(ge=1)]
    data_set: str
