"""Measure each tier's quality with the engine that serves it.

with labels              top-1 accuracy
a head, but no labels    share of images with the same class as the same model at k = 1.0
no head                  mean cosine of the features to those at k = 1.0
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pcae_export.images import decode
from pcae_export.progress import Progress
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.quality import Accuracy, Agreement, Fidelity
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import Engine
from pcae_training.data import LabelledImages
from pcae_training.score import Top1

BATCH = 8

Quality = Accuracy | Agreement | Fidelity


def measure_quality(
    bundle: Bundle, engine: Engine, images: LabelledImages, rows: Sequence[int], labelled: bool
) -> dict[str, Quality]:
    """Return each tier's quality on the given rows of `images`, by tier name.

    labelled: whether to compare with the images' labels, which must be the bundle's.
    """
    full_tiers = (
        {} if labelled else {model: _full_tier(bundle, model) for model in bundle.manifest.models}
    )
    total = {tier.name: 0.0 for tier in bundle.tiers}
    with Progress("measuring quality", len(rows), "images") as progress:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            pixels, labels = decode(images, batch), images.labels[batch].numpy()
            best = {model: engine.run(tier, pixels).vectors for model, tier in full_tiers.items()}
            for tier in bundle.tiers:
                answers = engine.run(tier, pixels).vectors
                if labelled:
                    total[tier.name] += int((answers.argmax(axis=1) == labels).sum())
                elif bundle.answers == "logits":
                    same = answers.argmax(axis=1) == best[tier.model].argmax(axis=1)
                    total[tier.name] += int(same.sum())
                else:
                    total[tier.name] += float(cosine(answers, best[tier.model]).sum())
            progress.update(len(batch))
    return _to_quality(bundle, total, len(rows), images.name, labelled)


def cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cosine [N] between rows [N, D] and the same rows of another array."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    found: NDArray[np.float32] = (one * other).sum(axis=1) / lengths
    return found


def _full_tier(bundle: Bundle, model: str) -> Tier:
    """Return a float32 tier of the model at k = 1.0, even if the bundle has none."""
    known = bundle.manifest.models[model]
    counts = (known.patches,) * len(known.reduction_points)
    some = next(tier for tier in bundle.tiers if tier.model == model)
    return some.model_copy(update={"token_counts": counts, "precision": "float32"})


def _to_quality(
    bundle: Bundle, total: Mapping[str, float], n: int, data_set: str, labelled: bool
) -> dict[str, Quality]:
    if labelled:
        shares = {name: Top1(int(hits), n) for name, hits in total.items()}
        return {
            name: Accuracy(top1=s.value, n=n, interval=s.interval, data_set=data_set)
            for name, s in shares.items()
        }
    if bundle.answers == "logits":
        return {
            name: Agreement(share=same / n, n=n, data_set=data_set) for name, same in total.items()
        }
    return {
        name: Fidelity(cosine=min(1.0, near / n), n=n, data_set=data_set)
        for name, near in total.items()
    }
