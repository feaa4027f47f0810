"""Make a classifier of a backbone and photographs in class folders, for `--classes-from`.

    photographs -> frozen features at every keep ratio -> linear head -> classifier

No network is trained. The quality of each tier is that of heads that have not seen the image.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pcae_export.measure import Measured, to_accuracy
from pcae_export.pack import TierSpec
from pcae_serve.bundle.tokens import parse_keep_ratio
from pcae_serve.errors import PcaeError
from pcae_training.checkpoint import Checkpoint
from pcae_training.data import LabelledImages
from pcae_training.frozen_features import compute_features
from pcae_training.linear_head import LOGISTIC_ROWS, HeadScore, LinearHead, fit_head
from pcae_training.model import VisionTransformer
from pcae_training.score import Difference

#: What a head was fitted on, in words.
_ORIGINS = {
    "largest": "one head, fitted at the largest keep ratio",
    "all": "one head, fitted at all keep ratios",
    "each": "a head per keep ratio (not served)",
}


@dataclass(frozen=True)
class PhotoClasses:
    """A backbone with a head fitted to photographs."""

    checkpoint: Checkpoint
    head: LinearHead
    photos: str  # name of the photographs, for the card

    def measured(self, tiers: Mapping[str, TierSpec]) -> dict[str, Measured]:
        """Return the cross-validated top-1 of each tier, by name."""
        folds = f"{self.photos} ({self.head.folds}-fold cross-validation of the head)"
        return {
            name: to_accuracy(self.head.chosen.correct(_ratio(spec)), folds)
            for name, spec in tiers.items()
        }

    def lines(self) -> Iterator[str]:
        """Yield a table of the ways to fit a head, in Markdown, and what was chosen."""
        ratios = list(self.head.chosen.logits)
        yield "| readout | head | " + " | ".join(f"k = {ratio:g}" for ratio in ratios) + " |"
        yield "| --- | --- |" + " --- |" * len(ratios)
        for score in self.head.compared:
            cells = [f"{100 * score.correct(ratio).mean():.1f}" for ratio in ratios]
            yield f"| {score.method} | {_ORIGINS[score.origin]} | {' | '.join(cells)} |"
        yield ""
        yield self._choice()

    def _choice(self) -> str:
        chosen, labels = self.head.chosen, self.head.chosen.labels
        text = (
            f"Top-1 in % on {len(labels):,} photographs of {len(self.checkpoint.labels)} classes"
            f" ({self.photos}), each classified by a head that was fitted without it"
            f" ({self.head.folds} stratified folds, seed 0; the backbone is as it was). Chosen:"
            f" {chosen.method}, {_ORIGINS[chosen.origin]}, then fitted to all photographs. The best"
            " of several ways looks slightly better than it is."
        )
        each = [score for score in self.head.compared if score.origin == "each"]
        if each:
            best = max(each, key=lambda score: score.top1)
            text += f" A head per keep ratio has {_compare(best, chosen)} over all keep ratios."
        if all(score.method == "ridge" for score in self.head.compared):
            text += (
                " Logistic regression was not tried: there are more than"
                f" {LOGISTIC_ROWS:,} features."
            )
        return text


def fit_classes(
    checkpoint: Checkpoint, tiers: Sequence[TierSpec], photos: LabelledImages
) -> PhotoClasses:
    """Fit a head to a backbone's features of `photos` at the keep ratios of `tiers`.

    Raises PcaeError if a class has a single photograph, or a photograph several labels.
    """
    _check(photos)
    ratios = sorted({_ratio(spec) for spec in tiers}, reverse=True)
    features = compute_features(checkpoint, photos, ratios)
    vectors = {ratio: rows.double().numpy() for ratio, rows in features.items()}
    head = fit_head(vectors, photos.labels.numpy())
    config = replace(checkpoint.model.config, classes=len(photos.classes))
    model = VisionTransformer(config)
    state = checkpoint.model.state_dict()
    for name in ["head", *(["head_dist"] if config.distilled else [])]:  # DeiT averages its heads
        state[f"{name}.weight"] = torch.from_numpy(head.weight).float()
        state[f"{name}.bias"] = torch.from_numpy(head.bias).float()
    model.load_state_dict(state)
    fitted = replace(checkpoint, model=model.eval(), labels=list(photos.classes))
    return PhotoClasses(fitted, head, photos.name)


def _check(photos: LabelledImages) -> None:
    if photos.several:
        raise PcaeError(f"{photos.name} has lists of labels; --classes-from needs one class each")
    counts = np.bincount(photos.labels.numpy(), minlength=len(photos.classes))
    few = [name for name, count in zip(photos.classes, counts, strict=True) if count < 2]
    if few:
        raise PcaeError(
            f"{photos.name} has fewer than two different readable photographs of"
            f" {', '.join(few)}; a head is measured on photographs that it has not seen, so each"
            " class needs two or more"
        )


def _compare(one: HeadScore, other: HeadScore) -> Difference:
    """Return the difference of top-1 over all images and keep ratios."""
    right = np.concatenate([one.correct(ratio) for ratio in one.logits])
    others = np.concatenate([other.correct(ratio) for ratio in other.logits])
    return Difference(int((right & ~others).sum()), int((others & ~right).sum()), len(right))


def _ratio(spec: TierSpec) -> float:
    return float(parse_keep_ratio(spec.keep_ratio))
