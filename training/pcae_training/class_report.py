"""Accuracy by class: precision, recall and F1, and which classes are taken for which."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pcae_serve.bundle.quality import wilson_interval
from pcae_training import interval_text
from pcae_training.score import Score
from pcae_training.text_table import align_columns

#: Classes that the text lists, and pairs of confused classes.
MAX_LISTED = 10


@dataclass(frozen=True)
class ClassFigures:
    """The figures of a class; None where nothing was predicted, or there is no image."""

    name: str
    images: int
    predicted: int  # images that were taken for this class
    correct: int

    @property
    def precision(self) -> float | None:
        return self.correct / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        return self.correct / self.images if self.images else None

    @property
    def recall_interval(self) -> tuple[float, float] | None:
        """The 95 % Wilson interval of the recall."""
        return None if self.recall is None else wilson_interval(self.recall, self.images)

    @property
    def f1(self) -> float | None:
        """2 TP / (2 TP + FP + FN); 0 if the class was never predicted."""
        return 2 * self.correct / (self.images + self.predicted) if self.images else None

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON, shares in [0, 1]."""
        return {
            "class": self.name,
            "images": self.images,
            "predicted": self.predicted,
            "correct": self.correct,
            "precision": self.precision,
            "recall": self.recall,
            "recall_interval": self.recall_interval,
            "f1": self.f1,
        }


@dataclass(frozen=True)
class ClassReport:
    """Figures of every class, from the answers to all images."""

    names: Sequence[str]
    confusion: Tensor  # int64 [classes, classes]: images by true class (row) and predicted class

    @classmethod
    def of(cls, score: Score, names: Sequence[str]) -> "ClassReport":
        """Count a score's answers."""
        n = len(names)
        pairs = score.labels.long() * n + score.predicted.long()
        return cls(names, torch.bincount(pairs, minlength=n * n).view(n, n))

    @cached_property
    def classes(self) -> list[ClassFigures]:
        """The figures of each class, in the order of the names."""
        images, predicted = self.confusion.sum(dim=1).tolist(), self.confusion.sum(dim=0).tolist()
        correct = self.confusion.diagonal().tolist()
        rows = zip(self.names, images, predicted, correct, strict=True)
        return [ClassFigures(*row) for row in rows]

    @property
    def balanced_accuracy(self) -> float:
        """The mean recall of the classes that have images."""
        return _mean([figures.recall for figures in self.classes])

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the classes that have images."""
        return _mean([figures.f1 for figures in self.classes])

    def confused(self, limit: int = MAX_LISTED) -> list[tuple[str, str, int]]:
        """Return the most frequent pairs of true and predicted class, and how many images each."""
        wrong = self.confusion.clone()
        wrong.fill_diagonal_(0)
        order = wrong.flatten().argsort(descending=True, stable=True)[:limit].tolist()
        n = len(self.names)
        pairs = [(at // n, at % n, int(wrong[at // n, at % n])) for at in order]
        return [
            (self.names[row], self.names[column], count) for row, column, count in pairs if count
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the figures and the matrix, true classes as rows, as JSON."""
        return {
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "classes": [figures.to_json() for figures in self.classes],
            "confusion": self.confusion.tolist(),
        }

    def lines(self) -> list[str]:
        """Return a table of the classes of lowest recall, and the most frequent confusions."""
        measured = [figures for figures in self.classes if figures.recall is not None]
        worst = sorted(measured, key=lambda figures: figures.recall or 0.0)[:MAX_LISTED]
        rows = [("class", "images", "recall % [95 %]", "precision %", "F1 %")]
        for each in worst:
            recall = interval_text.percent(
                each.recall or 0.0, each.recall_interval or (0.0, 0.0), digits=1
            )
            row = (each.name, f"{each.images:,}", recall, percent(each.precision))
            rows.append((*row, percent(each.f1)))
        lines = align_columns(rows)
        if len(measured) > MAX_LISTED:
            lines.append(f"({MAX_LISTED} of {len(measured):,} classes, those of lowest recall)")
        pairs = [f"{true} as {taken} {count:,}" for true, taken, count in self.confused(5)]
        if pairs:
            lines.append(f"most often confused: {', '.join(pairs)}")
        return [
            f"balanced accuracy {100 * self.balanced_accuracy:.2f} %,"
            f" macro F1 {100 * self.macro_f1:.2f} %",
            *lines,
        ]


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


def percent(value: float | None) -> str:
    """Return a share as a number of percent, with one decimal; a dash for None."""
    return "-" if value is None else f"{100 * value:.1f}"
