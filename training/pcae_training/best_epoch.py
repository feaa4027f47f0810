"""The best epoch of a run, by its held-out score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

#: The figure of an epoch that is its score, by keep ratio: top-1 or mean average precision.
SCORES = ("holdout_top1", "holdout_map")


@dataclass(frozen=True)
class BestEpoch:
    """Which epoch's weights a run keeps, and when it stops early.

    The score is the mean of the held-out score at the budgets that are measured after each epoch.
    Of equal epochs the first is the best.
    """

    patience: int | None = None  # epochs without a better score before the run stops; None: never

    def find(self, history: Sequence[Mapping[str, Any]]) -> int | None:
        """Return the number of the best epoch, or None before the first."""
        if not history:
            return None
        best = max(history, key=_score)
        return int(best["epoch"])

    def exhausted(self, history: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the run has gone `patience` epochs without a better score."""
        best = self.find(history)
        return (
            self.patience is not None
            and best is not None
            and int(history[-1]["epoch"]) - best >= self.patience
        )


def _score(row: Mapping[str, Any]) -> float:
    """Return the score of an epoch."""
    found = next(row[name] for name in SCORES if name in row)
    return fmean(found.values())
