"""Figures of each label, where an image has any number of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pcae_training import interval_text
from pcae_training.class_report import MAX_LISTED, ClassFigures, percent
from pcae_training.label_score import THRESHOLD, LabelScore
from pcae_training.text_table import align_columns


@dataclass(frozen=True)
class LabelReport:
    """Figures of every label, from the answers to all images."""

    score: LabelScore
    names: Sequence[str]

    @property
    def labels(self) -> list[ClassFigures]:
        """The figures of each label at the threshold, in the order of the names."""
        given, true = self.score.given, self.score.labels
        counts = (each.sum(dim=0).tolist() for each in (true, given, given & true))
        return [ClassFigures(*row) for row in zip(self.names, *counts, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON; an average precision is None if no image has the label."""
        precisions = self.score.average_precision
        return {
            **self.score.to_json(),
            "labels": [
                {**figures.to_json(), "average_precision": float(value) if figures.images else None}
                for figures, value in zip(self.labels, precisions, strict=True)
            ],
        }

    def lines(self) -> list[str]:
        """Return a table of the labels of lowest average precision."""
        pairs = zip(self.labels, self.score.average_precision.tolist(), strict=True)
        measured = [(figures, value) for figures, value in pairs if figures.images]
        rows = [("label", "images", "AP %", "recall % [95 %]", "precision %", "F1 %")]
        for each, value in sorted(measured, key=lambda pair: pair[1])[:MAX_LISTED]:
            recall = interval_text.percent(
                each.recall or 0.0, each.recall_interval or (0.0, 0.0), digits=1
            )
            row = (each.name, f"{each.images:,}", percent(value), recall)
            rows.append((*row, percent(each.precision), percent(each.f1)))
        lines = align_columns(rows)
        if len(measured) > MAX_LISTED:
            lines.append(f"({MAX_LISTED} of {len(measured):,} labels, those of lowest AP)")
        return [*lines, f"recall, precision and F1 at a probability of {THRESHOLD:g}"]
