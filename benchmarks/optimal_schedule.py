"""The best schedule that one device could have run with every arrival known: exact, offline.

    best(times_s, budgets_s, accuracy, seconds) -> Schedule       used by benchmarks/regret.py

A labelling search over the batches that `pcae_serve.loadtest.clairvoyant` describes. A label is
dropped if another one dominates it, or if an upper bound shows that it cannot exceed the best
schedule known. The bound is a Lagrangian relaxation: a request may be served several times, each
time at a price, which leaves a longest path over time. The result states whether it is proven.

Cost grows fast with the number of requests open at once and with distinct budgets: windows of up to
about 60 requests with few distinct budgets are practical. A window ends with its last arrival;
requests with longer budgets can be served after it on an otherwise idle device, which a server in
steady traffic could not do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pcae_serve.loadtest.clairvoyant import (
    ROUNDING_S,
    TOLERANCE,
    Bools,
    Floats,
    Ints,
    Labels,
    Objective,
    Problem,
    extend,
    make_problem,
    undominated,
)

#: Time steps of the bound per fastest batch, and at most; a longer window has longer steps.
STEPS_PER_BATCH, MAX_STEPS = 32, 4096
#: Subgradient steps on the prices; the bound is then stable to a few thousandths.
ROUNDS = 80
#: Price vectors kept; a label's bound is the lowest of theirs.
PRICE_VECTORS = 8
#: Width of the first search, whose schedule prunes the next one.
FIRST_WIDTH = 48


@dataclass(frozen=True, slots=True)
class Batch:
    start_s: float
    end_s: float
    tier: int
    members: tuple[int, ...]  # positions in the caller's list


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule; `value` divided by the number of requests is its effective accuracy."""

    value: float
    upper: float  # no schedule has more value than this
    optimal: bool  # proven: value equals upper
    batches: tuple[Batch, ...]
    labels: int = 0  # labels expanded by the search

    @property
    def served(self) -> int:
        return sum(len(batch.members) for batch in self.batches)


def best(
    times_s: Sequence[float] | Floats,
    budgets_s: Sequence[float] | Floats,
    accuracy: Sequence[float] | Floats,
    seconds: Sequence[Sequence[float]] | Floats,
    *,
    max_batch: int | None = None,
    objective: Objective = "accuracy",
    width: int = 4000,
) -> Schedule:
    """Return the schedule of most value for [n] arrivals and [n] budgets, counted from arrival.

    `accuracy` [K] is the value of one answer of a tier; `seconds` [K, B] those of a batch of 1..B,
    never less for a larger batch. With the objective "count", every answer has the value 1. At most
    `width` labels are kept per time slot, one fastest batch long; if more are needed, the result
    may be unproven (`optimal` is False).
    """
    problem = make_problem(times_s, budgets_s, accuracy, seconds, max_batch, objective)
    if not len(problem.arrival_s):
        return Schedule(0.0, 0.0, True, ())
    bound = LagrangianBound(problem)
    found = search(problem, bound, FIRST_WIDTH)
    for next_width in (FIRST_WIDTH, width):
        if not found.optimal:
            bound.settle(found.value)
            found = search(problem, bound, next_width, found)
    return found


class LagrangianBound:
    """Upper bound on the value that labels may still add: prices of requests, a table over time.

    Each answer costs the price of its request, and a request may be served any number of times. For
    any prices, (value of the best path through time) + (prices of the open requests) bounds the
    value. Time has G steps; a batch is counted from the step it starts in to the step it ends in,
    so that rounding can only raise the bound.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        n = len(problem.arrival_s)
        # the device does not idle after the last arrival; at worst it serves one by one
        last_s = float(problem.arrival_s.max()) + n * float(problem.single_s.max())
        last_s = min(last_s, float(problem.deadline_s.max()))
        self._step_s = max(problem.fastest_s / STEPS_PER_BATCH, last_s / MAX_STEPS)
        steps = int(last_s / self._step_s) + 2
        self._duration = np.maximum(1, problem.seconds // self._step_s).astype(np.int64)  # [A]
        grid_s = np.arange(steps) * self._step_s
        by_arrival = np.argsort(problem.arrival_s, kind="stable")
        self._arrival_rank = np.empty(n, dtype=np.int64)
        self._arrival_rank[by_arrival] = np.arange(n)
        arrived = np.searchsorted(
            problem.arrival_s[by_arrival], grid_s + self._step_s + ROUNDING_S, side="right"
        )  # [G], requests that have arrived by the end of the step
        late = np.searchsorted(
            problem.deadline_s, grid_s[:, None] + problem.seconds - 2 * ROUNDING_S
        )  # [G, A], requests with a deadline before the batch ends
        largest = int(problem.size.max())
        self._key = (arrived[:, None] * (n + 1) + late) * (largest + 1) + problem.size  # [G, A]
        self._next = np.minimum(np.arange(steps)[:, None] + self._duration, steps)  # [G, A]
        self._shape = (n + 1, n + 1, largest + 1)
        self.steps = steps
        prices = np.full(n, problem.accuracy.max() / 2)
        self._keep([(prices, self._path(prices)[0])])

    def __call__(self, free_s: Floats, open: Bools) -> Floats:
        """Return [N], an upper bound on the value that each label may still add."""
        step = self._step(free_s)
        to_come = self.tables[:, step] + self.prices @ open.T.astype(np.float64)
        bound: Floats = to_come.min(axis=0)
        return bound

    def after_batches(self, labels: Labels, row: Ints, start_s: Floats, arrived: Bools) -> Floats:
        """Return [R, A], a bound on the total value after each batch; fast, and not tight.

        A batch counts as if it took the cheapest requests that have `arrived` [R, n]; -inf if there
        are fewer than it takes.
        """
        problem, prices = self._problem, self.prices[0]
        low = np.where(arrived, prices, np.inf)
        low.sort(axis=1)
        cost = np.full((len(row), self._shape[2]), np.inf)
        known = min(self._shape[2], low.shape[1] + 1) - 1
        cost[:, 1 : known + 1] = low[:, :known].cumsum(axis=1)
        rest = labels.value[row] + labels.open[row] @ prices
        after = self.tables[0][self._step(start_s[:, None] + problem.seconds)]
        total: Floats = (
            problem.size * problem.accuracy + after - cost[:, problem.size] + rest[:, None]
        )
        return total

    def settle(self, known: float) -> None:
        """Lower the bound by subgradient steps (Polyak's rule); keep the best price vectors."""
        prices = self.prices[0].copy()
        ceiling = self._problem.accuracy.max()
        found = list[tuple[float, Floats, Floats]]()
        scale, stale, lowest = 1.0, 0, np.inf
        for _ in range(ROUNDS):
            table, choice, reach = self._path(prices)
            total = float(prices.sum() + table[0])
            found.append((total, prices.copy(), table))
            if total < lowest - 1e-6:
                lowest, stale = total, 0
            else:
                stale += 1
                if stale >= 4:
                    scale, stale = scale / 2, 0
            slope = 1.0 - self._served(prices, table, choice, reach)
            free = ~((prices <= 0) & (slope > 0))
            norm = float((slope[free] ** 2).sum())
            if not norm or total - known <= TOLERANCE:
                break
            prices = prices - scale * max(total - known, 1e-4) / norm * slope
            prices = np.clip(prices, 0.0, ceiling)
        found.sort(key=lambda row: row[0])
        self._keep([(prices, table) for _, prices, table in found[:PRICE_VECTORS]])

    def _keep(self, found: list[tuple[Floats, Floats]]) -> None:
        """Set these (prices, table), and one more vector: every price the best accuracy."""
        ceiling = np.full(len(self._problem.arrival_s), self._problem.accuracy.max())
        self.prices = np.array([prices for prices, _ in found] + [ceiling])  # [P, n]
        # [P, G + 1], value of the best path from a step on
        self.tables = np.array([table for _, table in found] + [np.zeros(self.steps + 1)])

    def _step(self, at_s: Floats) -> Ints:
        """Return the step of a time; the one before if rounding could move it."""
        step: Ints = (at_s / self._step_s - 1e-6).astype(np.int64)
        return np.minimum(step, self.steps)

    def _path(self, prices: Floats) -> tuple[Floats, Ints, Floats]:
        """Return [G + 1] best value from a step on, [G] action there, [G] value if it is taken."""
        problem, steps = self._problem, self.steps
        cost = self._cheapest(prices).ravel()
        gain = problem.size * problem.accuracy - cost[self._key]  # [G, A]
        table = np.zeros(steps + 1)
        choice = np.zeros(steps, dtype=np.int64)
        reach = np.zeros(steps)
        stride = int(self._duration.min())  # steps within a stride cannot follow one another
        for end in range(steps, 0, -stride):
            start = max(0, end - stride)
            total = gain[start:end] + table[self._next[start:end]]
            choice[start:end] = total.argmax(axis=1)
            reach[start:end] = total.max(axis=1)
            run = np.maximum.accumulate(np.append(table[end], reach[start:end][::-1]))
            table[start:end] = run[1:][::-1]
        return table, choice, reach

    def _cheapest(self, prices: Floats) -> Floats:
        """Return [n + 1, n + 1, B + 1]: sum of the b lowest prices, i arrived, j already late."""
        n = len(prices)
        order = np.argsort(prices, kind="stable")
        counts = np.arange(n + 1)
        fits = (self._arrival_rank[order] < counts[:, None])[:, None, :] & (
            order >= counts[:, None]
        )[None, :, :]  # [n + 1, n + 1, n]
        rank = fits.cumsum(axis=2)
        total = np.where(fits, prices[order], 0.0).cumsum(axis=2)
        sums = np.full(self._shape, np.inf)
        fits &= rank < self._shape[2]
        i, j, r = np.nonzero(fits)
        sums[i, j, rank[i, j, r]] = total[i, j, r]
        return sums

    def _served(self, prices: Floats, table: Floats, choice: Ints, reach: Floats) -> Floats:
        """Return [n], how many times the best path serves each request."""
        problem = self._problem
        served = np.zeros(len(prices))
        order = np.argsort(prices, kind="stable")
        step = 0
        while step < self.steps and table[step] > 0:
            step += int(np.argmax(reach[step:] >= table[step]))
            action = choice[step]
            arrived, rest = divmod(int(self._key[step, action]), self._shape[1] * self._shape[2])
            late = rest // self._shape[2]
            fits = order[(self._arrival_rank[order] < arrived) & (order >= late)]
            served[fits[: problem.size[action]]] += 1
            step = int(self._next[step, action])
        return served


def search(
    problem: Problem, bound: LagrangianBound, width: int, known: Schedule | None = None
) -> Schedule:
    """Expand labels in order of time, at most `width` per time slot, one fastest batch long."""
    fastest_s = problem.fastest_s
    value = known.value if known else 0.0
    cut = -np.inf  # highest bound of the labels beyond the width
    best_node = -1
    nodes = list[tuple[Ints, Floats, Ints]]()  # parent, start_s, action of every label kept
    count = expanded = 0
    waiting: dict[int, list[Labels]] = {0: [Labels.root(problem, bound)]}
    while waiting:
        slot = min(waiting)
        labels = Labels.join(waiting.pop(slot))
        expanded += len(labels)
        labels = labels.take(labels.bound > value + TOLERANCE)
        labels = labels.take(undominated(problem, labels))
        if len(labels) > width:
            order = np.argsort(-labels.bound, kind="stable")
            cut = max(cut, float(labels.bound[order[width]]))
            labels = labels.take(np.sort(order[:width]))
        if not len(labels):
            continue
        nodes.append((labels.parent, labels.start_s, labels.action))
        children = extend(problem, bound, labels, count, value)
        count += len(labels)
        if not len(children):
            continue
        top = int(children.value.argmax())
        if children.value[top] > value + TOLERANCE:
            value = float(children.value[top])
            nodes.append((children.parent[[top]], children.start_s[[top]], children.action[[top]]))
            best_node = count
            count += 1
        children = children.take(children.open.any(axis=1) & (children.bound > value + TOLERANCE))
        slots = np.maximum((children.free_s / fastest_s).astype(np.int64), slot + 1)
        for later in np.unique(slots):
            waiting.setdefault(int(later), []).append(children.take(slots == later))
    upper = max(value, cut) if known is None else max(value, min(cut, known.upper))
    proven = upper <= value + TOLERANCE
    expanded += known.labels if known else 0
    if best_node < 0:
        return Schedule(value, upper, proven, known.batches if known else (), expanded)
    return Schedule(value, upper, proven, _batches(problem, nodes, best_node), expanded)


def _batches(
    problem: Problem, nodes: list[tuple[Ints, Floats, Ints]], node: int
) -> tuple[Batch, ...]:
    """Return the batches on the path to a node, with their members."""
    parent = np.concatenate([part[0] for part in nodes])
    start_s = np.concatenate([part[1] for part in nodes])
    action = np.concatenate([part[2] for part in nodes])
    path = list[int]()
    while parent[node] >= 0:
        path.append(node)
        node = int(parent[node])
    open = np.ones(len(problem.arrival_s), dtype=np.bool_)
    batches = list[Batch]()
    for step in reversed(path):
        begin_s, a = float(start_s[step]), int(action[step])
        end_s = begin_s + float(problem.seconds[a])
        fits = open & (problem.arrival_s <= begin_s) & (problem.deadline_s >= end_s - ROUNDING_S)
        members = np.nonzero(fits)[0][: problem.size[a]]
        open[members] = False
        indices = tuple(int(index) for index in problem.index[members])
        start, end = problem.origin_s + begin_s, problem.origin_s + end_s
        batches.append(Batch(start, end, int(problem.tier[a]), indices))
    return tuple(batches)
