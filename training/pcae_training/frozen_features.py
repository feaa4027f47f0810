"""Compute the features of a frozen model, at several keep ratios."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pcae_training.checkpoint import Checkpoint
from pcae_training.data import LabelledImages
from pcae_training.evaluate import normalise, row_noise
from pcae_training.number_format import Precision, choose_dtype
from pcae_training.progress import Progress


@torch.inference_mode()
def compute_features(
    checkpoint: Checkpoint,
    images: LabelledImages,
    budgets: Sequence[float],
    *,
    batch_size: int = 250,
    precision: Precision = "fp32",
    workers: int = 0,
) -> dict[float, Tensor]:
    """Return float32 features [n, D] by keep ratio; each image is decoded once.

    checkpoint: a model without a head. precision: of the model's products, on its device.
    """
    model, config = checkpoint.model, checkpoint.model.config
    device = model.device
    dtype = choose_dtype(precision, device.type)
    parts: dict[float, list[Tensor]] = {ratio: [] for ratio in budgets}
    done = 0
    with Progress("computing features", len(images)) as progress:
        for pixels, labels in images.batches(range(len(images)), batch_size, workers):
            batch = normalise(pixels.to(device), checkpoint.preprocess)
            rows = [images.row(index) for index in range(done, done + len(labels))]
            noise = row_noise(config, rows, device)
            for ratio, features in parts.items():
                counts = config.geometry.counts(ratio)
                with torch.autocast(device.type, dtype, dtype != torch.float32):
                    features.append(model(batch, counts, noise=noise).float().cpu())
            done += len(labels)
            progress.update(len(labels))
    return {ratio: torch.cat(features) for ratio, features in parts.items()}
