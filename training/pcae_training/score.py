"""Accuracy, paired differences of accuracy and calibration error, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from pcae_serve.bundle.quality import wilson_interval
from pcae_training.interval_text import percent, points

#: Confidence bins of the calibration error, of equal width (Guo et al. 2017).
BINS = 15

#: With fewer classes the label is always among the five highest logits.
MIN_CLASSES_FOR_TOP5 = 6

_Z_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Top1:
    """Share of images classified correctly, with a 95 % Wilson interval."""

    name = "top-1"

    correct: int
    n: int

    @property
    def value(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.value, self.n)

    def __str__(self) -> str:
        return f"{percent(self.value, self.interval, ' %')} of {self.n:,}"


@dataclass(frozen=True)
class Difference:
    """One budget's top-1 minus another's, on the same n images, with a 95 % interval."""

    gained: int  # images that only the first budget classifies correctly
    lost: int  # images that only the second one does
    n: int

    @property
    def value(self) -> float:
        return (self.gained - self.lost) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wald's interval for paired proportions, one image added to `gained` and to `lost`.

        Bonett and Price 2012. Without the two images its width would be zero if both budgets
        always agree, and too small if they nearly do.
        """
        n = self.n + 2
        centre = (self.gained - self.lost) / n
        variance = (self.gained + self.lost + 2) / n - centre**2
        half = _Z_95 * (variance / n) ** 0.5
        return max(-1.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        return points(self.value, self.interval)


@dataclass(frozen=True, eq=False)
class Score:
    """One budget's results, image by image; `+` concatenates the scores of different images."""

    key, short = "top1", "top-1"  # the figure by which a run is judged, in JSON and in text
    columns = ("top-1 % [95 %]", "top-5 %", "ECE %")

    labels: Tensor  # int64 [n]
    predicted: Tensor  # int64 [n]: the class of the highest logit
    among_five: Tensor | None  # [n] bool: one of the five highest; None below six classes
    confidence: Tensor  # [n] float32: probability of the predicted class

    @classmethod
    def from_logits(cls, logits: Tensor, labels: Tensor) -> "Score":
        """Score logits [n, classes] against labels [n], on their device and without a sync."""
        among_five = None
        if logits.shape[1] >= MIN_CLASSES_FOR_TOP5:
            among_five = (logits.topk(5, dim=1).indices == labels[:, None]).any(dim=1)
        confidence = logits.float().softmax(dim=1).amax(dim=1)
        return cls(labels.long(), logits.argmax(dim=1), among_five, confidence)

    @classmethod
    def join(cls, parts: Sequence["Score"]) -> "Score":
        """Concatenate scores, on the CPU. Raise ValueError if there are none."""
        if not parts:
            raise ValueError("no scores to join")
        five = [part.among_five for part in parts if part.among_five is not None]
        return cls(
            torch.cat([part.labels for part in parts]).cpu(),
            torch.cat([part.predicted for part in parts]).cpu(),
            torch.cat(five).cpu() if five else None,
            torch.cat([part.confidence for part in parts]).cpu(),
        )

    def __add__(self, other: "Score") -> "Score":
        return Score.join([self, other])

    @property
    def n(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> Tensor:
        """Whether each label has the highest logit, [n] bool."""
        return self.predicted == self.labels

    @property
    def top1(self) -> Top1:
        return Top1(int(self.correct.sum()), self.n)

    @property
    def headline(self) -> Top1:
        """The figure by which a run is judged."""
        return self.top1

    @property
    def top5(self) -> Top1 | None:
        """Share of images whose label is among the five highest logits; None below six classes."""
        if self.among_five is None:
            return None
        return Top1(int(self.among_five.sum()), self.n)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error in [0, 1] (Guo et al., arXiv 1706.04599, equation 3).

        The mean distance between confidence and accuracy over BINS bins, each open at its lower
        and closed at its upper edge.
        """
        edges = torch.arange(1, BINS, dtype=torch.float64) / BINS
        confidence = self.confidence.double()
        bins = torch.bucketize(confidence, edges)
        gaps = torch.bincount(bins, weights=confidence - self.correct.double(), minlength=BINS)
        return float(gaps.abs().sum()) / self.n

    def cells(self) -> tuple[str, ...]:
        """Return the text of each of `columns`."""
        return (
            percent(self.top1.value, self.top1.interval),
            "-" if self.top5 is None else f"{100 * self.top5.value:.2f}",
            f"{100 * self.calibration_error:.2f}",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON, shares in [0, 1]; top-5 is None below six classes."""
        shares = {"top1": self.top1, "top5": self.top5}
        figures: dict[str, Any] = {
            name: share and {"value": share.value, "interval": share.interval}
            for name, share in shares.items()
        }
        return figures | {"calibration_error": self.calibration_error}

    def against(self, other: "Score") -> Difference:
        """Return top-1 minus that of `other` on the same images.

        Raise ValueError if the numbers of images differ.
        """
        if self.n != other.n:
            raise ValueError(f"{self.n} results cannot be paired with {other.n}")
        return Difference(
            gained=int((self.correct & ~other.correct).sum()),
            lost=int((other.correct & ~self.correct).sum()),
            n=self.n,
        )
