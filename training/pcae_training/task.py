"""What a classifier answers, one class or any number of labels: loss, probabilities and score."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from pcae_training.label_score import LabelScore, MeanPrecision
from pcae_training.score import Score, Top1


@dataclass(frozen=True)
class OneClass:
    """An image has one class: a softmax over all of them."""

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy of logits and targets, both [B, classes].

        weights: of the images, float32 [B].
        """
        if weights is None:
            return F.cross_entropy(logits, targets)
        return (weights * F.cross_entropy(logits, targets, reduction="none")).mean()

    def score(self, logits: Tensor, labels: Tensor) -> Score:
        """Score logits [n, classes] against labels int64 [n], on their device, without a sync."""
        return Score.from_logits(logits, labels)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probability of each class, which sum to one, of logits [B, classes]."""
        return logits.softmax(dim=-1)


@dataclass(frozen=True)
class SeveralLabels:
    """An image has any number of labels: a sigmoid for each."""

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the binary cross-entropy of logits and targets [B, classes], mean over both.

        weights: of the images, float32 [B].
        """
        factors = None if weights is None else weights[:, None]
        return F.binary_cross_entropy_with_logits(logits, targets, factors)

    def score(self, logits: Tensor, labels: Tensor) -> LabelScore:
        """Score logits against sets of labels, bool [n, classes], on their device."""
        return LabelScore.from_logits(logits, labels)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probability of each label, of logits [B, classes]."""
        return logits.sigmoid()


Task = OneClass | SeveralLabels

AnyScore = Score | LabelScore

#: The figure by which a run is judged.
Headline = Top1 | MeanPrecision


def choose_task(several: bool) -> Task:
    """Return what fits the images: `several` if each has any number of labels."""
    return SeveralLabels() if several else OneClass()


def join_parts(parts: Sequence[AnyScore]) -> AnyScore:
    """Concatenate scores of one type, on the CPU. Raise ValueError if there are none."""
    several = [part for part in parts if isinstance(part, LabelScore)]
    if several:
        return LabelScore.join(several)
    return Score.join([part for part in parts if isinstance(part, Score)])
