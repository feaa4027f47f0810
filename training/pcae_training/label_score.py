"""Scores of independent labels: mean average precision with intervals, and F1 at a threshold."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcae_training.interval_text import percent, points

#: A label is given to an image if its probability is at least this.
THRESHOLD = 0.5

#: Resamples of the images, for intervals.
RESAMPLES = 200


@dataclass(frozen=True)
class MeanPrecision:
    """Mean average precision over the labels, with a 95 % bootstrap interval over the images."""

    name = "mean average precision"

    value: float
    interval: tuple[float, float]
    n: int

    def __str__(self) -> str:
        return f"{percent(self.value, self.interval, ' %')} of {self.n:,}"


@dataclass(frozen=True)
class PrecisionDifference:
    """One budget's mean average precision minus another's on the same images."""

    value: float
    interval: tuple[float, float]  # 95 %, of paired resamples

    def __str__(self) -> str:
        return points(self.value, self.interval)


@dataclass(frozen=True, eq=False)
class LabelScore:
    """One budget's results, image by image."""

    key, short = "map", "mAP"  # the figure by which a run is judged, in JSON and in text
    columns = ("mAP % [95 %]", "micro F1 %", "macro F1 %")

    labels: Tensor  # bool [n, classes]
    probabilities: Tensor  # float32 [n, classes]

    @classmethod
    def from_logits(cls, logits: Tensor, labels: Tensor) -> "LabelScore":
        """Score logits [n, classes] against label sets bool [n, classes], without a sync."""
        return cls(labels.bool(), logits.float().sigmoid())

    @classmethod
    def join(cls, parts: Sequence["LabelScore"]) -> "LabelScore":
        """Concatenate scores, on the CPU. Raise ValueError if there are none."""
        if not parts:
            raise ValueError("no scores to join")
        return cls(
            torch.cat([part.labels for part in parts]).cpu(),
            torch.cat([part.probabilities for part in parts]).cpu(),
        )

    @property
    def n(self) -> int:
        return len(self.labels)

    @property
    def given(self) -> Tensor:
        """The labels that the model gives, bool [n, classes]."""
        return self.probabilities >= THRESHOLD

    @cached_property
    def average_precision(self) -> NDArray[np.float64]:
        """The average precision of each label, [classes]; NaN if no image has it."""
        (found,) = self._precisions(np.ones((1, self.n)))
        return np.asarray(found)

    @cached_property
    def headline(self) -> MeanPrecision:
        """The mean average precision of the labels that some image has."""
        return MeanPrecision(_mean(self.average_precision), _interval(self._resampled), self.n)

    @property
    def micro_f1(self) -> float:
        """F1 of all labels of all images together, at the threshold."""
        hits, errors = self._counts()
        return _f1(int(hits.sum()), int(errors.sum()))

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the labels that some image has, at the threshold."""
        pairs = zip(
            self.labels.any(dim=0).tolist(), *map(Tensor.tolist, self._counts()), strict=True
        )
        values = [_f1(hits, errors) for present, hits, errors in pairs if present]
        return sum(values) / len(values) if values else 0.0

    def cells(self) -> tuple[str, ...]:
        """Return the text of each of `columns`."""
        return (
            percent(self.headline.value, self.headline.interval),
            f"{100 * self.micro_f1:.2f}",
            f"{100 * self.macro_f1:.2f}",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON, shares in [0, 1]."""
        return {
            "map": {"value": self.headline.value, "interval": self.headline.interval},
            "micro_f1": self.micro_f1,
            "macro_f1": self.macro_f1,
            "threshold": THRESHOLD,
        }

    def against(self, other: "LabelScore") -> PrecisionDifference:
        """Return the mean average precision minus that of `other` on the same images.

        Raise ValueError if the numbers of images differ.
        """
        if self.n != other.n:
            raise ValueError(f"{self.n} results cannot be paired with {other.n}")
        value = self.headline.value - other.headline.value
        return PrecisionDifference(value, _interval(self._resampled - other._resampled))

    def _counts(self) -> tuple[Tensor, Tensor]:
        """Return how often each label is rightly given, and wrongly given or missed, [classes]."""
        return (self.given & self.labels).sum(dim=0), (self.given ^ self.labels).sum(dim=0)

    @cached_property
    def _resampled(self) -> NDArray[np.float64]:
        """The mean average precision of each resample, [RESAMPLES]; the same images for all."""
        rng = np.random.default_rng(self.n)
        weights = rng.multinomial(self.n, np.full(self.n, 1 / self.n), RESAMPLES).astype(float)
        return np.array([_mean(row) for row in self._precisions(weights)])

    def _precisions(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return average precisions [r, classes] with the images weighted by `weights` [r, n].

        The sum over thresholds of the gain in recall times the precision, as scikit-learn defines
        it. Images of equal probability are passed at once.
        """
        found = np.full((len(weights), self.labels.shape[1]), np.nan)
        for number in self.labels.any(dim=0).nonzero().flatten().tolist():
            probabilities = self.probabilities[:, number].numpy()
            order = np.argsort(-probabilities, kind="stable")
            ends = np.append(np.diff(probabilities[order]) != 0, True)
            ordered = weights[:, order]
            right = np.cumsum(ordered * self.labels[order, number].numpy(), axis=1)[:, ends]
            taken = np.cumsum(ordered, axis=1)[:, ends]
            gained = np.diff(right, axis=1, prepend=0)
            with np.errstate(invalid="ignore"):  # 0 / 0: not drawn
                precision = np.nan_to_num(right / taken)
                found[:, number] = (gained * precision).sum(axis=1) / right[:, -1]
        return found


def _f1(hits: int, errors: int) -> float:
    return 2 * hits / (2 * hits + errors) if hits + errors else 0.0


def _mean(values: NDArray[np.float64]) -> float:
    """Return the mean of the values that are not NaN; 0 if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the central 95 % of `values`."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
