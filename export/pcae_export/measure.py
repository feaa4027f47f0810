"""Top-1 per tier through the served engine: image files in, right answers counted.

It knows a bundle and labelled images; it knows nothing of torch models or of graphs.
"""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from pcae_serve.bundle import Accuracy, Bundle
from pcae_serve.engines import Engine, Pixels
from pcae_training.data import LabelledImages
from pcae_training.score import Top1

BATCH = 8


def decode(images: LabelledImages, rows: Sequence[int]) -> Pixels:
    """Image files to pixels [N, H, W, 3] uint8, by the way requests take."""
    return np.stack([images[row][0].permute(1, 2, 0).numpy() for row in rows])


def top1(
    bundle: Bundle, engine: Engine, images: LabelledImages, rows: Sequence[int]
) -> dict[str, Accuracy]:
    """Tier name to accuracy on the given rows of `images`."""
    correct = {tier.name: 0 for tier in bundle.tiers}
    with tqdm(total=len(rows), desc="measuring", unit="img", leave=False) as bar:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            pixels, labels = decode(images, batch), images.labels[batch].numpy()
            for tier in bundle.tiers:
                answers = engine.run(tier, pixels).vectors.argmax(axis=1)
                correct[tier.name] += int((answers == labels).sum())
            bar.update(len(batch))
    found = {}
    for name, hits in correct.items():
        share = Top1(hits, len(rows))
        found[name] = Accuracy(
            top1=share.value, n=share.n, interval=share.interval, data_set=images.name
        )
    return found
