"""Clairvoyant schedules for one device: search with every arrival known in advance.

A schedule is a sequence of batches, each on one tier and not interrupted. A request counts, with
the accuracy of its tier, if its batch ends by its deadline. Service times are constants of
(tier, batch), and every request allows every tier.

Four exchange arguments, each of which leaves a schedule no worse, limit the batches to try:

    members   a batch takes the earliest deadlines among the requests that have arrived and can
              still be met
    start     a batch starts when the device becomes free, or when its last member arrives
    waiting   no member has waited for as long as it would have taken alone
    size      no batch takes as long as two smaller ones with the same requests

The search is a labelling algorithm in order of time. A label is a partial schedule: when the device
becomes free, which requests are open, the value so far. Label x dominates label y if x is free no
later and, with d the most requests that y could still serve and x could not, x is ahead by at least
d times the best accuracy.

`most_answered` is a beam search, for capacity. The exact search is benchmarks/optimal_schedule.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Objective = Literal["accuracy", "count"]

#: Seconds by which a batch may end late: rounding errors only.
ROUNDING_S = 1e-12
#: Smallest difference in value, in requests, that counts.
TOLERANCE = 1e-9
#: Labels that are compared with all others of their time slot.
MAX_DOMINATORS = 128
#: Beam search: estimated value of an open request, as a share of its answer's value.
OPEN_REQUEST_VALUE = 0.8
#: Beam search: labels kept per label of the width, until all labels of a time slot are known.
SPARE = 4


@dataclass(frozen=True, slots=True)
class Problem:
    """Requests in order of deadline, and the batches worth running; times from the first arrival.

    n requests, A (tier, size) pairs.
    """

    origin_s: float  # the first arrival, on the caller's clock
    arrival_s: Floats  # [n]
    deadline_s: Floats  # [n]
    index: Ints  # [n], position in the caller's list
    tier: Ints  # [A]
    size: Ints  # [A]
    seconds: Floats  # [A]
    single_s: Floats  # [A], seconds of a batch of one on the same tier
    accuracy: Floats  # [A], value of one answer

    @property
    def fastest_s(self) -> float:
        return float(self.seconds.min())


class Estimate(Protocol):
    """The value that labels may still add: an upper bound, or an estimate."""

    def __call__(self, free_s: Floats, open: Bools) -> Floats:
        """Return values [N] for devices free at `free_s` [N], with requests `open` [N, n]."""

    def after_batches(self, labels: "Labels", row: Ints, start_s: Floats, arrived: Bools) -> Floats:
        """Return bounds [R, A] of the total value if a batch follows label `row` at `start_s`.

        -inf if fewer requests have `arrived` [R, n] than the batch takes.
        """


@dataclass(slots=True)
class Labels:
    """N partial schedules of n requests, one a row."""

    free_s: Floats  # [N]
    open: Bools  # [N, n], not served and can still be met
    value: Floats  # [N]
    bound: Floats  # [N], value plus the estimate of what is still to come
    parent: Ints  # [N], node that the row extends; -1 for the root
    start_s: Floats  # [N], of the batch that was added last
    action: Ints  # [N], that batch, 0..A-1

    def __len__(self) -> int:
        return len(self.free_s)

    @classmethod
    def root(cls, problem: Problem, estimate: Estimate) -> Self:
        """Return the empty schedule at the first arrival that can be served."""
        free_s = np.array([problem.arrival_s.min()])
        open = np.ones((1, len(problem.arrival_s)), dtype=np.bool_)
        zero = np.zeros(1, dtype=np.int64)
        return cls(free_s, open, np.zeros(1), estimate(free_s, open), zero - 1, np.zeros(1), zero)

    @classmethod
    def join(cls, parts: list[Self]) -> Self:
        return cls(
            np.concatenate([part.free_s for part in parts]),
            np.concatenate([part.open for part in parts]),
            np.concatenate([part.value for part in parts]),
            np.concatenate([part.bound for part in parts]),
            np.concatenate([part.parent for part in parts]),
            np.concatenate([part.start_s for part in parts]),
            np.concatenate([part.action for part in parts]),
        )

    def take(self, rows: Ints | Bools) -> Self:
        return type(self)(
            self.free_s[rows],
            self.open[rows],
            self.value[rows],
            self.bound[rows],
            self.parent[rows],
            self.start_s[rows],
            self.action[rows],
        )


def make_problem(
    times_s: Sequence[float] | Floats,
    budgets_s: Sequence[float] | Floats,
    accuracy: Sequence[float] | Floats,
    seconds: Sequence[Sequence[float]] | Floats,
    max_batch: int | None = None,
    objective: Objective = "accuracy",
) -> Problem:
    """Sort [n] requests by deadline and drop the batches that another one dominates.

    `budgets_s` [n] count from the arrivals `times_s` [n]. `accuracy` [K] is the value of one answer
    of a tier; with the objective "count" every answer has the value 1. `seconds` [K, B] are those
    of a batch of 1..B; ValueError if they fall as the batch grows, or are not positive.
    """
    arrival_s = np.asarray(times_s, dtype=np.float64)
    origin_s = float(arrival_s.min(initial=np.inf))
    arrival_s = arrival_s - origin_s
    deadline_s = arrival_s + np.asarray(budgets_s, dtype=np.float64)
    table_s = np.asarray(seconds, dtype=np.float64)[:, :max_batch]  # [K, B]
    values = np.asarray(accuracy, dtype=np.float64)
    if (np.diff(table_s, axis=1) < 0).any() or (table_s <= 0).any():
        raise ValueError("seconds must be positive and must not fall as batches grow")
    if objective == "count":
        values = np.ones_like(values)
    kept = list[tuple[int, int]]()
    for k, row_s in enumerate(table_s):
        if values[k] <= 0 or _dominated_tier(k, values, table_s):
            continue
        for b in range(1, len(row_s) + 1):
            halves_s = row_s[: b - 1] + row_s[: b - 1][::-1]  # 1 + (b - 1), 2 + (b - 2), …
            if b == 1 or row_s[b - 1] < halves_s.min():
                kept.append((k, b))
    tier = np.array([k for k, _ in kept], dtype=np.int64)
    size = np.array([b for _, b in kept], dtype=np.int64)
    batch_s = table_s[tier, size - 1]
    order = np.lexsort((arrival_s, deadline_s))
    # a budget below the fastest batch can never be met
    order = order[(deadline_s - arrival_s)[order] >= batch_s.min(initial=np.inf) - ROUNDING_S]
    return Problem(
        origin_s,
        arrival_s[order],
        deadline_s[order],
        order.astype(np.int64),
        tier,
        size,
        batch_s,
        table_s[tier, 0],
        values[tier],
    )


def _dominated_tier(k: int, values: Floats, table_s: Floats) -> bool:
    """Return whether another tier is as good and as fast; of equal ones the first is kept."""
    for other in range(len(values)):
        if other != k and values[other] >= values[k] and (table_s[other] <= table_s[k]).all():
            equal = values[other] == values[k] and (table_s[other] == table_s[k]).all()
            if not equal or other < k:
                return True
    return False


def undominated(problem: Problem, labels: Labels) -> Ints:
    """Return the rows that no other row dominates."""
    packed = np.packbits(labels.open, axis=1)
    order = np.lexsort((-labels.value, labels.free_s, *packed.T))
    # among equal open sets, in order of time: only rows of more value than all earlier ones
    same = (packed[order][1:] == packed[order][:-1]).all(axis=1)
    group = np.concatenate(([0], np.cumsum(~same))) if len(order) else np.zeros(0)
    ceiling = 2.0 * (1.0 + len(problem.arrival_s)) * max(1.0, float(problem.accuracy.max()))
    stacked = labels.value[order] + group * ceiling
    before = np.concatenate(([-np.inf], np.maximum.accumulate(stacked)[:-1]))
    rows = order[stacked > before + TOLERANCE] if len(order) else order
    if len(rows) < 2:
        return rows
    rows = rows[np.lexsort((labels.free_s[rows], -labels.bound[rows]))]
    # [N, n], open requests with this deadline or a later one
    later = labels.open[rows][:, ::-1].cumsum(axis=1, dtype=np.int16)
    free_s, value = labels.free_s[rows], labels.value[rows]
    best = float(problem.accuracy.max())
    alive = np.ones(len(rows), dtype=np.bool_)
    for x in range(min(MAX_DOMINATORS, len(rows))):
        if not alive[x]:
            continue
        rivals = np.nonzero(alive & (free_s >= free_s[x]) & (value <= value[x] + TOLERANCE / 2))[0]
        lacking = (later[rivals] - later[x]).max(axis=1).clip(0)
        dominated = rivals[value[rivals] + best * lacking <= value[x] + TOLERANCE / 2]
        alive[dominated[dominated != x]] = False
    return np.sort(rows[alive])


def extend(
    problem: Problem, estimate: Estimate, labels: Labels, first: int, value: float
) -> Labels:
    """Return all extensions of the labels by one batch whose total value can exceed `value`.

    `first` is the node number of the first label.
    """
    arrival_s, deadline_s, fastest_s = problem.arrival_s, problem.deadline_s, problem.fastest_s
    moments_s = np.unique(arrival_s)  # [M]
    # [N, 1 + M]: at once, or at an arrival; column 0 is "at once"
    starts_s = np.concatenate(
        (labels.free_s[:, None], np.broadcast_to(moments_s, (len(labels), len(moments_s)))), axis=1
    )
    free_s = labels.free_s[:, None]
    soon = (starts_s > free_s) & (starts_s < free_s + problem.single_s.max())
    soon[:, 0] = True
    row, moment = np.nonzero(soon)
    start_s = starts_s[row, moment]
    arrived = labels.open[row] & (arrival_s <= start_s[:, None])  # [R, n]
    total = estimate.after_batches(labels, row, start_s, arrived)
    pick, action = np.nonzero(total > value + TOLERANCE)
    row, moment, start_s, arrived = row[pick], moment[pick], start_s[pick], arrived[pick]
    end_s = start_s + problem.seconds[action]
    fits = arrived & (deadline_s >= end_s[:, None] - ROUNDING_S)  # [C, n]
    taken = fits & (fits.cumsum(axis=1, dtype=np.int16) <= problem.size[action][:, None])
    full = taken.sum(axis=1) == problem.size[action]
    newest = (taken & (arrival_s == start_s[:, None])).any(axis=1)
    since_s = np.maximum(arrival_s, labels.free_s[row][:, None])
    idle = (taken & (since_s + problem.single_s[action][:, None] <= start_s[:, None])).any(axis=1)
    good = full & ((moment == 0) | (newest & ~idle))
    row, start_s, end_s, action, taken = (
        row[good], start_s[good], end_s[good], action[good], taken[good],
    )  # fmt: skip
    earned = labels.value[row] + problem.size[action] * problem.accuracy[action]
    ready_s = np.maximum(end_s[:, None], arrival_s)
    open = labels.open[row] & ~taken & (deadline_s >= ready_s + fastest_s - ROUNDING_S)
    next_s = np.where(open, ready_s, np.inf).min(axis=1, initial=np.inf)
    free_s = np.where(np.isfinite(next_s), next_s, end_s)  # the next arrival, if none has arrived
    return Labels(
        free_s, open, earned, earned + estimate(free_s, open), row + first, start_s, action
    )


class _BeamEstimate:
    """A rough estimate: open requests at a fixed value, less the value of the time used."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        throughput = float((problem.size / problem.seconds).max())
        self._value_per_s = throughput * (1 - OPEN_REQUEST_VALUE)

    def __call__(self, free_s: Floats, open: Bools) -> Floats:
        estimate: Floats = OPEN_REQUEST_VALUE * open.sum(axis=1) - self._value_per_s * free_s
        return estimate

    def after_batches(self, labels: Labels, row: Ints, start_s: Floats, arrived: Bools) -> Floats:
        return np.where(arrived.sum(axis=1)[:, None] >= self._problem.size, np.inf, -np.inf)


def most_answered(problem: Problem, width: int) -> float:
    """Return the value of the best schedule that a beam search finds.

    At most `width` labels are kept per time slot, one fastest batch long. The result is a lower
    bound of the optimum; more width mostly raises it.
    """
    n = len(problem.arrival_s)
    if not n:
        return 0.0
    estimate = _BeamEstimate(problem)
    fastest_s, longest_s = problem.fastest_s, float(problem.seconds.max())
    arrivals_s = np.sort(problem.arrival_s)
    best_value = 0.0
    waiting: dict[int, list[Labels]] = {0: [Labels.root(problem, estimate)]}
    while waiting:
        slot = min(waiting)
        labels = Labels.join(waiting.pop(slot))
        # requests that matter until the next batch ends, and the first one to arrive after it
        until_s = float(labels.free_s.max()) + fastest_s + longest_s
        last = min(int(np.searchsorted(arrivals_s, until_s, side="right")), n - 1)
        near = np.nonzero((problem.arrival_s <= arrivals_s[last]) & labels.open.any(axis=0))[0]
        part = replace(
            problem,
            arrival_s=problem.arrival_s[near],
            deadline_s=problem.deadline_s[near],
            index=problem.index[near],
        )
        all_open = labels.open
        labels.open = all_open[:, near]
        rows = undominated(part, labels)
        rows = rows[np.argsort(-labels.bound[rows], kind="stable")[:width]]
        labels, all_open = labels.take(rows), all_open[rows]
        children = extend(part, estimate, labels, 0, -np.inf)
        if not len(children):
            continue
        best_value = max(best_value, float(children.value.max()))
        slots = np.maximum((children.free_s / fastest_s).astype(np.int64), slot + 1)
        for later in np.unique(slots):
            picked = np.nonzero(slots == later)[0]
            order = np.argsort(-children.bound[picked], kind="stable")[: SPARE * width]
            kept = children.take(picked[order])
            open = all_open[kept.parent]
            open[:, near] = kept.open
            # the estimate of the part leaves out the requests outside it
            kept.bound += OPEN_REQUEST_VALUE * (open.sum(axis=1) - kept.open.sum(axis=1))
            kept.open = open
            kept = kept.take(np.nonzero(open.any(axis=1))[0])
            if len(kept):
                waiting.setdefault(int(later), []).append(kept)
    return best_value
