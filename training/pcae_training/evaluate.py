"""Top-1 accuracy per budget, with its interval: what tiers are chosen by.

It knows a model, pixels and labels; it draws no random numbers and changes nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor
from tqdm import tqdm

from pcae_serve.preprocess import Preprocess
from pcae_training.data import LabelledImages
from pcae_training.model import VisionTransformer


@dataclass(frozen=True)
class Top1:
    """Share of images whose highest logit is the label, with a 95 % Wilson interval."""

    correct: int
    n: int

    @property
    def value(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        bounds = binomtest(self.correct, self.n).proportion_ci(0.95, method="wilson")
        return float(bounds.low), float(bounds.high)

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.interval)
        return f"{100 * self.value:.2f} % [{low:.2f}, {high:.2f}] of {self.n:,}"


def normalise(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 pixels [B, 3, H, W] to the float32 images a model takes."""
    mean, std = (
        torch.tensor(values, device=pixels.device).view(1, -1, 1, 1)
        for values in (preprocess.mean, preprocess.std)
    )
    return (pixels.float() / 255 - mean) / std


@torch.inference_mode()
def evaluate(
    model: VisionTransformer,
    images: LabelledImages,
    rows: Sequence[int],
    budgets: Iterable[float],
    *,
    batch_size: int = 250,
    precision: torch.dtype = torch.float32,
) -> dict[float, Top1]:
    """Top-1 of `model` at every keep ratio in `budgets`, on the given rows of `images`."""
    budgets, device = tuple(dict.fromkeys(budgets)), model.pos_embed.device
    correct = dict.fromkeys(budgets, 0)
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(rows), desc="evaluating", unit="img", leave=False)
    for pixels, labels in images.batches(rows, batch_size):
        batch = normalise(pixels.to(device), images.preprocess)
        for budget in budgets:
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                logits = model(batch, model.config.geometry.counts(budget))
            correct[budget] += int((logits.argmax(1).cpu() == labels).sum())
        bar.update(len(labels))
    bar.close()
    model.train(was_training)
    return {budget: Top1(hits, len(rows)) for budget, hits in correct.items()}
