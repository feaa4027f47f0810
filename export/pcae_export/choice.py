"""Which reduction suits weights that were trained without one: measured on images, in torch.

A ViT that was never trained to lose tokens takes some rules better than others. Each candidate runs
at every wanted keep ratio, and its answers are held against the same model's at k = 1.0. It knows a
model and pixels; it needs no labels and writes nothing.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from pcae_serve.bundle.tokens import KeepRatio, Rule
from pcae_serve.engines.base import Pixels
from pcae_training.checkpoint import Checkpoint
from pcae_training.evaluate import normalise
from pcae_training.model import VisionTransformer
from pcae_training.reduction import fixed_order

#: What is tried. `random` is the floor that the others must stand above: shown, never chosen.
CANDIDATES: tuple[Rule, ...] = ("ptr", "weighted", "merged", "random")
FLOOR: Rule = "random"
#: Without any images to measure on: the best of the above on DINOv2 and photographs
#: (benchmarks/records/2026-11-24_export).
DEFAULT_REDUCTION: Rule = "merged"
BATCH = 8


@dataclass(frozen=True)
class Choice:
    """How near every candidate's answers are to k = 1.0's, and the rule that follows from it."""

    cosines: dict[Rule, NDArray[np.float32]]  # [keep ratios, images]
    agreement: dict[Rule, NDArray[np.float64]]  # [keep ratios], share of images; of logits alone
    ratios: tuple[KeepRatio, ...]

    @property
    def rule(self) -> Rule:
        """The candidate with the highest mean, the floor left out."""
        found = {rule: float(c.mean()) for rule, c in self.cosines.items() if rule != FLOOR}
        return max(found, key=lambda rule: found[rule])

    def lines(self) -> Iterable[str]:
        """The table as Markdown, and how sure the choice is."""
        ratios = " | ".join(f"k = {ratio}" for ratio in self.ratios)
        yield f"| reduction | {ratios} |"
        yield "| --- |" + " --- |" * len(self.ratios)
        for rule, cosines in self.cosines.items():
            cells = [f"{mean:.3f}" for mean in cosines.mean(axis=1)]
            if rule in self.agreement:
                shares = self.agreement[rule]
                cells = [f"{c}, {100 * a:.0f} %" for c, a in zip(cells, shares, strict=True)]
            yield f"| {rule} | {' | '.join(cells)} |"
        yield ""
        of = "logits less their mean" if self.agreement else "features"
        also = ", and how often both name the same class" if self.agreement else ""
        images = next(iter(self.cosines.values())).shape[1]
        yield (
            f"Mean cosine of the {of} to k = 1.0's on {images} images{also}. `{FLOOR}` is the"
            f" floor. Chosen: `{self.rule}`{self._beside()}."
        )

    def _beside(self) -> str:
        """How far the chosen one is ahead of the next, with a 95 % interval over images."""
        mine = self.cosines[self.rule].mean(axis=0)  # [images]
        others = [c.mean(axis=0) for r, c in self.cosines.items() if r not in (self.rule, FLOOR)]
        if not others:
            return ""
        difference = mine - max(others, key=lambda found: float(found.mean()))
        half = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
        return f", {difference.mean():.4f} ± {half:.4f} ahead of the next, paired by image"


@torch.inference_mode()
def choose_reduction(
    checkpoint: Checkpoint,
    pixels: Pixels,
    ratios: Sequence[KeepRatio],
    candidates: Sequence[Rule] = CANDIDATES,
) -> Choice:
    """Try every candidate at every ratio below 1 on pixels [N, H, W, 3] uint8, N >= 2."""
    model, geometry = checkpoint.model.eval(), checkpoint.model.config.geometry
    full = geometry.counts(1)
    budgets = {ratio: geometry.counts(ratio) for ratio in ratios}
    budgets = {ratio: counts for ratio, counts in budgets.items() if counts != full}
    batches = [
        normalise(torch.from_numpy(part).permute(0, 3, 1, 2), checkpoint.preprocess)
        for part in np.array_split(pixels, range(BATCH, len(pixels), BATCH))
    ]
    runs = len(candidates) * len(budgets) + 1
    cosines: dict[Rule, NDArray[np.float32]] = {}
    agreement: dict[Rule, NDArray[np.float64]] = {}
    with tqdm(total=runs * len(pixels), desc="choosing", unit="img", leave=False) as bar:
        whole = _answers(model, batches, full, bar)
        for rule in candidates:
            tried = _with(model, rule)
            found = [_answers(tried, batches, counts, bar) for counts in budgets.values()]
            near = [torch.cosine_similarity(_level(f, model), _level(whole, model)) for f in found]
            cosines[rule] = torch.stack(near).numpy()
            if model.config.classes:
                same = [(f.argmax(1) == whole.argmax(1)).double().mean() for f in found]
                agreement[rule] = torch.stack(same).numpy()
    return Choice(cosines, agreement, tuple(budgets))


def _with(model: VisionTransformer, rule: Rule) -> VisionTransformer:
    """The same weights under another rule."""
    other = copy(model)
    other.config = replace(model.config, reduction=rule)
    return other


def _answers(
    model: VisionTransformer, batches: Sequence[Tensor], counts: Sequence[int], bar: Any
) -> Tensor:
    """Logits [N, classes], or features [N, D]."""
    order, found = fixed_order(model.config.geometry.patches), []
    for batch in batches:
        found.append(model(batch, counts, noise=order))
        bar.update(len(batch))
    return torch.cat(found)


def _level(answers: Tensor, model: VisionTransformer) -> Tensor:
    """What cosines are taken of: of logits only the differences between classes mean anything."""
    return answers - answers.mean(dim=1, keepdim=True) if model.config.classes else answers
