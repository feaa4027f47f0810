"""How close a backbone's features at a keep ratio are to those at keep ratio 1, by torch.

    cls     the normed CLS token, if the model has one
    mean    the mean over normed patches that are kept (with their sizes under `weighted`, `merged`)
    dense   the state of every patch, dropped ones included

A bundle's graph returns one of the first two. The weights are the same for both, so all three are
measured with torch, on the weights as stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pcae_export.progress import Progress
from pcae_serve.bundle.manifest import Tier
from pcae_serve.engines.base import Pixels
from pcae_training.checkpoint import Checkpoint
from pcae_training.evaluate import normalise
from pcae_training.model import VisionTransformer
from pcae_training.reduction import Tokens, fixed_order

#: Images that the card's figures are measured on, at most: torch takes longer than the engine.
MAX_IMAGES = 128
BATCH = 16


@dataclass(frozen=True)
class FeatureFidelity:
    """Cosines to keep ratio 1, one for each of N images."""

    cosines: Mapping[str, NDArray[np.float32]]  # cls, mean, dense (the mean over patches): [N]

    @property
    def images(self) -> int:
        """Return N."""
        return len(self.cosines["dense"])


def measure_features(
    checkpoint: Checkpoint, pixels: Pixels, counts: Sequence[Sequence[int]]
) -> list[FeatureFidelity]:
    """Return the fidelity at each of `counts` (patches kept per stage).

    pixels: uint8 [N, H, W, 3].
    """
    model, full = checkpoint.model.eval(), checkpoint.model.config.geometry.counts(1)
    cosines: list[dict[str, list[Tensor]]] = [{} for _ in counts]
    with Progress("measuring features", len(pixels), "images") as progress:
        for start in range(0, len(pixels), BATCH):
            batch = torch.from_numpy(pixels[start : start + BATCH]).permute(0, 3, 1, 2)
            images = normalise(batch, checkpoint.preprocess)
            exact = _features(model, images, full)
            for found, some in zip(cosines, counts, strict=True):
                reduced = exact if tuple(some) == full else _features(model, images, some)
                for name, values in reduced.items():
                    alike = F.cosine_similarity(values, exact[name], dim=-1)  # [B] or [B, H, W]
                    found.setdefault(name, []).append(alike.view(len(alike), -1).mean(dim=1))
            progress.update(len(batch))
    return [
        FeatureFidelity({name: torch.cat(parts).numpy() for name, parts in found.items()})
        for found in cosines
    ]


def measure_tiers(
    checkpoint: Checkpoint, pixels: Pixels, tiers: Sequence[Tier]
) -> dict[str, FeatureFidelity]:
    """Return the fidelity of one model's float32 tiers, by name."""
    exact = [tier for tier in tiers if tier.precision == "float32"]
    found = measure_features(checkpoint, pixels, [tier.token_counts for tier in exact])
    return {tier.name: each for tier, each in zip(exact, found, strict=True)}


@torch.inference_mode()
def _features(model: VisionTransformer, images: Tensor, counts: Sequence[int]) -> dict[str, Tensor]:
    """Return cls [B, D], mean [B, D] and dense [B, H, W, D] of normalised images."""
    order = fixed_order(model.config.geometry.patches)
    *_, last = model.walk(model.embed(images), counts, noise=order, dense=True)
    found = {"mean": _mean(model, last), "dense": model.patch_grid(last)}
    if model.config.class_token and model.config.pooling != "mean":
        found["cls"] = model.norm(last.x[:, 0])
    return found


def _mean(model: VisionTransformer, last: Tokens) -> Tensor:
    """Return the mean over patches with the final norm where the model has it, [B, D]."""
    if model.config.pooling == "mean":
        pooled: Tensor = model.fc_norm(last.pool())
        return pooled
    return last._replace(x=model.norm(last.x)).pool()
