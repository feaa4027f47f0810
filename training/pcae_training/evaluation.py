"""The result of an evaluation: figures per budget, by class and in total, as text and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pcae_serve.bundle.tokens import Geometry
from pcae_training.class_report import ClassReport
from pcae_training.label_report import LabelReport
from pcae_training.label_score import LabelScore, PrecisionDifference
from pcae_training.score import MIN_CLASSES_FOR_TOP5, Difference, Score
from pcae_training.task import AnyScore
from pcae_training.text_table import align_columns


def report_classes(score: AnyScore, names: Sequence[str]) -> ClassReport | LabelReport:
    """Return a score's figures by class."""
    if isinstance(score, LabelScore):
        return LabelReport(score, names)
    return ClassReport.of(score, names)


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model; as text, a table with a line per budget."""

    data: str
    geometry: Geometry
    #: From the largest keep ratio, which the others are compared with; all of one type.
    scores: Mapping[float, AnyScore]
    precision: str = ""  # a line on the number formats of weights and arithmetic
    rows: Sequence[int] | None = None  # each image's row in the data; default: all rows in order
    names: Sequence[str] = ()  # of the classes

    @property
    def n(self) -> int:
        return next(iter(self.scores.values())).n

    @property
    def several(self) -> bool:
        """Whether an image has any number of labels."""
        return isinstance(next(iter(self.scores.values())), LabelScore)

    def differences(self) -> dict[float, Difference | PrecisionDifference]:
        """Return the score of every smaller budget minus that of the largest."""
        largest, *smaller = self.scores.values()
        ratios = list(self.scores)[1:]
        pairs = zip(ratios, smaller, strict=True)
        return {ratio: score.against(largest) for ratio, score in pairs}  # type: ignore[arg-type]

    def macs(self, ratio: float) -> int:
        return self.geometry.macs(self.geometry.counts(ratio))

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON: shares and differences in [0, 1], a list entry per budget.

        `wrong` lists the misclassified images by their row in the data.
        """
        rows = range(self.n) if self.rows is None else self.rows
        differences, names = self.differences(), list(self.names)
        budgets = []
        for ratio, score in self.scores.items():
            less = differences.get(ratio)
            figures: dict[str, Any] = {
                "keep_ratio": ratio,
                "patches": self.geometry.counts(ratio),
                "macs": self.macs(ratio),
                **score.to_json(),
                f"{score.key}_difference": less
                and {"value": less.value, "interval": less.interval},
            }
            if names:
                figures["by_class"] = report_classes(score, names).to_json()
            if isinstance(score, Score):
                wrong = (~score.correct).nonzero().flatten().tolist()
                figures["wrong"] = [rows[index] for index in wrong]
            budgets.append(figures)
        return {"data": self.data, "n": self.n, "precision": self.precision, "budgets": budgets}

    def by_class(self) -> str:
        """Return a table of the classes with the lowest figures at the largest keep ratio."""
        ratio, score = next(iter(self.scores.items()))
        lines = report_classes(score, self.names).lines()
        return "\n".join([f"by class, at keep {ratio:g}:", *lines])

    def __str__(self) -> str:
        differences = self.differences()
        largest, first = next(iter(self.scores.items()))
        difference = f"{first.short} minus keep {largest:g} [95 %]"
        rows = [["keep", "patches left", "GMACs", *first.columns, difference]]
        for ratio, score in self.scores.items():
            counts = ", ".join(map(str, self.geometry.counts(ratio)))
            cost = f"{self.macs(ratio) / 1e9:.3f}"
            less = str(differences.get(ratio, "-"))
            rows.append([f"{ratio:g}", counts, cost, *score.cells(), less])
        lines = align_columns(rows)
        if isinstance(first, Score) and self.geometry.classes < MIN_CLASSES_FOR_TOP5:
            lines.append(f"top-5 is not meaningful with {self.geometry.classes} classes")
        if self.precision:
            lines.append(self.precision)
        return "\n".join([f"{self.n:,} images of {self.data}", *lines])
