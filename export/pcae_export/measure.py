"""Measure each tier's quality with the engine that serves it.

with labels              top-1 accuracy
a head, but no labels    share of images with the same class as the same model at k = 1.0
no head                  mean cosine of the features to those at k = 1.0
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from pcae_export.images import decode
from pcae_export.progress import Progress
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.probabilities import margin, same_answer
from pcae_serve.bundle.quality import Accuracy, Agreement, Fidelity, wilson_interval
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import Engine
from pcae_training.data import LabelledImages
from pcae_training.score import Top1

BATCH = 8

Quality = Accuracy | Agreement | Fidelity


@dataclass(frozen=True)
class Measured:
    """A tier's quality, and the score of each image that it is the mean of."""

    quality: Quality
    scores: NDArray[np.float64]  # [N]: right or not, the same answer or not, or a cosine
    margins: NDArray[np.float32] | None = None  # [N] of classes, if temperatures are known

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the mean score: Wilson's of a share, Student's of cosines."""
        if isinstance(self.quality, Fidelity):
            return mean_interval(self.scores)
        return wilson_interval(float(self.scores.mean()), len(self.scores))


def measure_quality(
    bundle: Bundle,
    engine: Engine,
    images: LabelledImages,
    rows: Sequence[int],
    labelled: bool,
    temperatures: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Measured]:
    """Return each tier's quality on the given rows of `images`, by tier name.

    labelled: whether to compare with the images' labels, which must be the bundle's. temperatures:
    by tier, of a calibrated bundle, for margins.
    """
    full_tiers = (
        {} if labelled else {model: full_tier(bundle, model) for model in bundle.manifest.models}
    )
    scores: dict[str, list[NDArray[Any]]] = {tier.name: [] for tier in bundle.tiers}
    margins: dict[str, list[NDArray[np.float32]]] = {name: [] for name in temperatures}
    with Progress("measuring quality", len(rows), "images") as progress:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            pixels, labels = decode(images, batch), images.labels[batch].numpy()
            best = {model: engine.run(tier, pixels).vectors for model, tier in full_tiers.items()}
            for tier in bundle.tiers:
                vectors = engine.run(tier, pixels).vectors
                if labelled:
                    found = vectors.argmax(axis=1) == labels
                elif bundle.answers == "features":
                    found = cosine(vectors, best[tier.model])
                else:
                    found = same_answer(vectors, best[tier.model], bundle.answers)
                scores[tier.name].append(found)
                if tier.name in temperatures:
                    margins[tier.name].append(margin(vectors, temperatures[tier.name]))
            progress.update(len(batch))
    measured = {
        name: _to_measured(bundle, np.concatenate(parts).astype(float), images.name, labelled)
        for name, parts in scores.items()
    }
    known = {name: np.concatenate(parts) for name, parts in margins.items()}
    return {name: replace(found, margins=known.get(name)) for name, found in measured.items()}


def cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cosine [N] between rows [N, D] and the same rows of another array."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    found: NDArray[np.float32] = (one * other).sum(axis=1) / lengths
    return found


def mean_interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of cosines, or of their differences, by Student's t."""
    n, mean = len(differences), float(differences.mean())
    if n < 2:
        return -2.0, 2.0  # all that a cosine can differ by
    half = float(t.ppf(0.975, n - 1) * differences.std(ddof=1) / n**0.5)
    return mean - half, mean + half


def to_accuracy(correct: NDArray[Any], data_set: str) -> Measured:
    """Return the top-1 of images that were classified correctly or not, [N]."""
    top1 = Top1(int(correct.sum()), len(correct))
    quality = Accuracy(top1=top1.value, n=top1.n, interval=top1.interval, data_set=data_set)
    return Measured(quality, correct.astype(float))


def full_tier(bundle: Bundle, model: str) -> Tier:
    """Return a float32 tier of the model at k = 1.0, even if the bundle has none."""
    known = bundle.manifest.models[model]
    counts = (known.patches,) * len(known.reduction_points)
    some = next(tier for tier in bundle.tiers if tier.model == model)
    return some.model_copy(update={"token_counts": counts, "precision": "float32"})


def _to_measured(
    bundle: Bundle, scores: NDArray[np.float64], data_set: str, labelled: bool
) -> Measured:
    n, mean = len(scores), float(scores.mean())
    quality: Quality
    if labelled:
        return to_accuracy(scores, data_set)
    if bundle.answers == "features":
        quality = Fidelity(cosine=min(1.0, mean), n=n, data_set=data_set)
    else:
        quality = Agreement(share=mean, n=n, data_set=data_set)
    return Measured(quality, scores)
