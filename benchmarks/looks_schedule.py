"""A good schedule with second looks and every arrival known, offline: a beam search.

    Search(times_s, budgets_s, accuracy, seconds, gains).run(width) -> Found

Used by benchmarks/clairvoyant_looks.py. One device runs first looks, second looks of images that it
has answered, or waits for the next arrival. What a second look gains depends on the image, so the
exchange arguments of the exact search (optimal_schedule.py) do not hold; without second looks, both
find nearly the same on the windows of the record. The schedule is a lower bound of the best one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Batch sizes that the search tries, for first and for second looks.
FIRST_SIZES, SECOND_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32), (1, 2, 3, 4, 6, 8)
#: Prices of a second of the device, in answers. With a price, an open request counts with the most
#: that its accuracy can exceed the price of its time by. The best schedule of all searches counts.
PRICES_PER_S = (1.0, 3.0, 6.0, 12.0, 40.0, 120.0, 280.0)
#: Batch size whose seconds per image the price of an open request is computed with.
TYPICAL = 3
#: Labels whose duplicates are looked for, per label kept.
SPARE = 3
ROUNDING_S = 1e-9
OPEN, ENDED = -1, -2  # in place of the tier of a first look
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """A schedule of n requests."""

    value: float  # expected right answers in time
    answered: int  # in time

    def figures(self, n: int, accuracy: Sequence[float]) -> dict[str, float]:
        """Return effective accuracy, attainment and the accuracy recovered."""
        mean = self.value / self.answered if self.answered else accuracy[0]
        recovered = (mean - accuracy[0]) / (accuracy[-1] - accuracy[0])
        return {
            "effective": self.value / n,
            "attainment": self.answered / n,
            "recovered": recovered,
        }


@dataclass
class _Labels:
    """N partial schedules, one a row."""

    free_s: Floats  # [N], when the device is free
    state: NDArray[np.int8]  # [N, n], OPEN, ENDED, or the tier of a first look
    value: Floats  # [N]
    answered: NDArray[np.int64]  # [N]

    def take(self, rows: NDArray[Any]) -> "_Labels":
        return _Labels(self.free_s[rows], self.state[rows], self.value[rows], self.answered[rows])


class Search:
    """A beam search over first looks, second looks and waits for the next arrival."""

    def __init__(
        self,
        times_s: Floats,
        budgets_s: Floats,
        accuracy: Sequence[float],
        seconds: Sequence[Sequence[float]],
        gains: Floats,
    ) -> None:
        """times_s, budgets_s: [n]. seconds: by tier, of a batch of 1, 2, … gains: [n, first,
        second], what a second look adds; 0: nothing.
        """
        deadline_s = times_s + budgets_s
        order = np.lexsort((times_s, deadline_s))
        self.arrival_s, self.deadline_s = times_s[order], deadline_s[order]
        self.accuracy, self.seconds, self.gains = list(accuracy), seconds, gains[order]
        self.fastest_s = min(row[0] for row in seconds)
        self.most_gain = self.gains.max(axis=2, initial=0.0)  # [n, first]

    def run(self, width: int) -> Found:
        """Return the best schedule found with `width` labels per time slot."""
        found = [self._run(width, price) for price in PRICES_PER_S]
        return max(found, key=lambda each: each.value)

    def _run(self, width: int, price_per_s: float) -> Found:
        n = len(self.arrival_s)
        root = _Labels(
            np.array([self.arrival_s.min()]),
            np.full((1, n), OPEN, np.int8),
            np.zeros(1),
            np.zeros(1, np.int64),
        )
        best_found, waiting = Found(0.0, 0), {0: [root]}
        while waiting:
            slot = min(waiting)
            labels = _join(waiting.pop(slot))
            top = int(labels.value.argmax())
            if labels.value[top] > best_found.value:
                best_found = Found(float(labels.value[top]), int(labels.answered[top]))
            children = self._extend(self._prune(labels, width, price_per_s))
            if children is None:
                continue
            slots = np.maximum((children.free_s / self.fastest_s).astype(int), slot + 1)
            for later in np.unique(slots):
                waiting.setdefault(int(later), []).append(children.take(slots == later))
        return best_found

    def _score(self, labels: _Labels, price_per_s: float) -> Floats:
        """Return the value of labels [N], with an estimate of what is still to come."""
        size = min(TYPICAL, *map(len, self.seconds))
        image_s = np.array([row[size - 1] / size for row in self.seconds])
        single_s = np.array([row[0] for row in self.seconds])
        more = np.maximum(0.0, (self.gains - price_per_s * single_s).max(axis=2))  # [n, first]
        each = (np.array(self.accuracy) - price_per_s * image_s + more).max(axis=1)  # [n]
        later = ((labels.state == OPEN) * np.maximum(0.0, each)).sum(axis=1)
        for first in range(len(self.accuracy)):
            later += ((labels.state == first) * more[:, first]).sum(axis=1)
        score: Floats = labels.value + later - price_per_s * labels.free_s
        return score

    def _prune(self, labels: _Labels, width: int, price_per_s: float) -> _Labels:
        """Keep the labels with the best scores; none that another one is as good as in all.

        It is if it leaves the same to do, is free no later and is worth no less.
        """
        order = np.argsort(-self._score(labels, price_per_s), kind="stable")[: SPARE * width]
        seen, kept = dict[bytes, list[tuple[float, float]]](), list[int]()
        for row in order.tolist():
            free_s, value = float(labels.free_s[row]), float(labels.value[row])
            alike = seen.setdefault(labels.state[row].tobytes(), [])
            if any(other_s <= free_s and worth >= value for other_s, worth in alike):
                continue
            alike.append((free_s, value))
            kept.append(row)
            if len(kept) == width:
                break
        return labels.take(np.array(kept))

    def _extend(self, labels: _Labels) -> _Labels | None:
        """Return the labels after one more batch or wait; None if nothing is left to do."""
        parts = [*self._first_looks(labels), *self._second_looks(labels), self._waits(labels)]
        children = _join(parts)
        # what can no longer end in time ends as it is
        too_late = self.deadline_s < (children.free_s + self.fastest_s)[:, None] - ROUNDING_S
        children.state = np.where(too_late, ENDED, children.state).astype(np.int8)
        children = children.take((children.state != ENDED).any(axis=1) | (children.value > 0))
        return children if len(children.value) else None

    def _first_looks(self, labels: _Labels) -> list[_Labels]:
        parts = list[_Labels]()
        arrived = self.arrival_s <= labels.free_s[:, None] + ROUNDING_S
        waits = (labels.state == OPEN) & arrived
        for tier, table_s in enumerate(self.seconds):
            keeps = np.where(self.most_gain[:, tier] > 0, tier, ENDED).astype(np.int8)
            for size in (each for each in FIRST_SIZES if each <= len(table_s)):
                end_s = labels.free_s + table_s[size - 1]
                fits = waits & (self.deadline_s >= end_s[:, None] - ROUNDING_S)
                rows = np.nonzero(fits.sum(axis=1) >= size)[0]
                if not len(rows):
                    break
                taken = fits[rows] & (fits[rows].cumsum(axis=1) <= size)
                parts.append(
                    _Labels(
                        end_s[rows],
                        np.where(taken, keeps, labels.state[rows]),
                        labels.value[rows] + size * self.accuracy[tier],
                        labels.answered[rows] + size,
                    )
                )
        return parts

    def _second_looks(self, labels: _Labels) -> list[_Labels]:
        parts = list[_Labels]()
        held = np.nonzero((labels.state >= 0).any(axis=1))[0]
        if not len(held):
            return parts
        state, images = labels.state[held], np.arange(labels.state.shape[1])
        for tier in range(1, len(self.accuracy)):
            every = np.where(state >= 0, self.gains[images, np.maximum(state, 0), tier], 0.0)
            for size in SECOND_SIZES:
                end_s = labels.free_s[held] + self.seconds[tier][size - 1]
                gain = np.where(self.deadline_s >= end_s[:, None] - ROUNDING_S, every, 0.0)
                order = np.argsort(-gain, axis=1, kind="stable")[:, :size]
                chosen = np.take_along_axis(gain, order, axis=1)
                rows = np.nonzero(chosen[:, -1] > 0)[0] if chosen.shape[1] == size else []
                if not len(rows):
                    break
                after = state[rows].copy()
                np.put_along_axis(after, order[rows], np.int8(ENDED), axis=1)
                parts.append(
                    _Labels(
                        end_s[rows],
                        after,
                        labels.value[held[rows]] + chosen[rows].sum(axis=1),
                        labels.answered[held[rows]],
                    )
                )
        return parts

    def _waits(self, labels: _Labels) -> _Labels:
        """Return the labels of an idle device, at the next arrival."""
        comes = (labels.state == OPEN) & (self.arrival_s > labels.free_s[:, None] + ROUNDING_S)
        next_s = np.where(comes, self.arrival_s, np.inf).min(axis=1)
        rows = np.nonzero(np.isfinite(next_s))[0]
        part = labels.take(rows)
        part.free_s = next_s[rows]
        return part


def _join(parts: Sequence[_Labels]) -> _Labels:
    return _Labels(
        np.concatenate([part.free_s for part in parts]),
        np.concatenate([part.state for part in parts]),
        np.concatenate([part.value for part in parts]),
        np.concatenate([part.answered for part in parts]),
    )
