"""Choose a reduction rule for weights that were trained without one, by measuring in torch.

A ViT that was trained without reduction loses more accuracy with some rules than with others. Each
candidate runs at every requested keep ratio, and its outputs are compared with the same model's at
k = 1.0. No labels are needed.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pcae_export.progress import Progress
from pcae_serve.bundle.probabilities import same_answer
from pcae_serve.bundle.tokens import KeepRatio, Rule
from pcae_serve.engines.base import Pixels
from pcae_training.checkpoint import Checkpoint
from pcae_training.evaluate import normalise
from pcae_training.model import VisionTransformer
from pcae_training.reduction import fixed_order

#: Rules to compare. `random` is the baseline: it is shown, but never chosen.
CANDIDATES: tuple[Rule, ...] = ("ptr", "weighted", "merged", "random")
FLOOR: Rule = "random"
#: Used if there are no images to measure on: the best candidate on DINOv2 and photographs
#: (benchmarks/records/2026-11-24_export).
DEFAULT_REDUCTION: Rule = "merged"
BATCH = 8


@dataclass(frozen=True)
class Choice:
    """Similarity of each candidate's outputs to those at k = 1.0, and the rule chosen by it."""

    cosines: dict[Rule, NDArray[np.float32]]  # [keep ratios, images]
    agreement: dict[Rule, NDArray[np.float64]]  # [keep ratios], share of images; empty for features
    ratios: tuple[KeepRatio, ...]

    @property
    def rule(self) -> Rule:
        """Return the candidate with the highest mean cosine, except FLOOR."""
        found = {rule: float(c.mean()) for rule, c in self.cosines.items() if rule != FLOOR}
        return max(found, key=lambda rule: found[rule])

    def lines(self) -> Iterable[str]:
        """Yield the table in Markdown, then a paragraph on the choice and its uncertainty."""
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
        of = "logits (minus their mean)" if self.agreement else "features"
        also = ", and share of images with the same class" if self.agreement else ""
        images = next(iter(self.cosines.values())).shape[1]
        yield (
            f"Mean cosine of the {of} to those at k = 1.0 on {images} images{also}. `{FLOOR}` is"
            f" the baseline. Chosen: `{self.rule}`{self._lead()}."
        )

    def _lead(self) -> str:
        """Return the chosen rule's lead over the next best, with a 95 % interval over images."""
        mine = self.cosines[self.rule].mean(axis=0)  # [images]
        others = [c.mean(axis=0) for r, c in self.cosines.items() if r not in (self.rule, FLOOR)]
        if not others:
            return ""
        difference = mine - max(others, key=lambda found: float(found.mean()))
        half = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
        return f", by {difference.mean():.4f} ± {half:.4f} over the next best, paired by image"


@torch.inference_mode()
def choose_reduction(
    checkpoint: Checkpoint,
    pixels: Pixels,
    ratios: Sequence[KeepRatio],
    candidates: Sequence[Rule] = CANDIDATES,
) -> Choice:
    """Compare all candidates at every ratio below 1 on pixels uint8 [N, H, W, 3], N >= 2."""
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
    with Progress("comparing reductions", runs * len(pixels), "images") as progress:
        full_outputs = _answers(model, batches, full, progress)
        for rule in candidates:
            candidate = _with(model, rule)
            found = [_answers(candidate, batches, counts, progress) for counts in budgets.values()]
            near = [
                torch.cosine_similarity(_level(f, checkpoint), _level(full_outputs, checkpoint))
                for f in found
            ]
            cosines[rule] = torch.stack(near).numpy()
            if model.config.classes:
                same = [
                    same_answer(f.numpy(), full_outputs.numpy(), checkpoint.answers).mean()
                    for f in found
                ]
                agreement[rule] = np.array(same)
    return Choice(cosines, agreement, tuple(budgets))


def _with(model: VisionTransformer, rule: Rule) -> VisionTransformer:
    """Return the same weights with another rule."""
    other = copy(model)
    other.config = replace(model.config, reduction=rule)
    return other


def _answers(
    model: VisionTransformer, batches: Sequence[Tensor], counts: Sequence[int], progress: Progress
) -> Tensor:
    """Return logits [N, classes] or features [N, D]."""
    order, found = fixed_order(model.config.geometry.patches), []
    for batch in batches:
        found.append(model(batch, counts, noise=order))
        progress.update(len(batch))
    return torch.cat(found)


def _level(answers: Tensor, checkpoint: Checkpoint) -> Tensor:
    """Return the vectors to take cosines of; of logits of classes only differences have a meaning.

    The cosine of a single number would be its sign, so a label's logit gets a constant next to it.
    """
    if checkpoint.answers == "classes":
        return answers - answers.mean(dim=1, keepdim=True)
    return F.pad(answers, (0, 1), value=1.0) if checkpoint.answers == "labels" else answers
