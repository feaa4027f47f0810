"""The offline oracle: the best that one device could have done, had it known every arrival.

A schedule is a row of batches, each on one tier, none interrupted; a request counts, with the
accuracy of its tier, if its batch ends by its deadline. The search finds the row of most value, and
says whether that is proven.

It is exact by four exchanges, each of which makes a schedule no worse:

    who       a batch takes the earliest deadlines among those that are there and not yet too late
    when      it starts as the device becomes free, or as its last member arrives
    waiting   nothing in a batch was there for as long as it would have taken on its own
    size      no batch is run that would be as quick in two

What is left is searched in order of time. A label is (when the device is free, who is open, value
so far). It is dropped if another one is free no later and, though it lacked up to d of the requests
the first one could still serve, is ahead by d times the best accuracy; or if the bound says that it
cannot end above the best schedule known. The bound lets a request be served many times at a price
(Lagrange), so that it is a longest path over time alone: one table, looked up for every label.

It knows no queue, policy or clock, and no time but the one it is given: service times are constants
of (tier, batch), every tier is allowed to every request. Any budgets will do, but cost grows fast
with the requests in hand at once and with distinct budgets: it is meant for windows of up to some
60 requests of a few budgets. A window ends with its last arrival and nothing comes behind it: then,
what has a loose deadline is served at leisure, which a server amid traffic could not do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Objective = Literal["accuracy", "count"]

#: Seconds by which a batch may end late: rounding, and nothing else.
ROUNDING_S = 1e-12
#: Value, in requests, that is not worth a search.
TOLERANCE = 1e-9
#: Steps of the bound's clock in the time of the fastest batch.
FINENESS = 32
#: Steps of the bound's clock at most; where time is longer, they are.
MAX_STEPS = 4096
#: Rounds of pricing; the bound has settled to a few thousandths by then.
ROUNDS = 80
#: Settled prices that a label is judged by; the lowest bound of these counts.
KEPT = 8
#: Labels kept at a time for the first schedule, to prune the search by.
FIRST_WIDTH = 48
#: Labels that are compared with all others of their time.
DOMINATORS = 128


@dataclass(frozen=True, slots=True)
class Batch:
    start_s: float
    end_s: float
    tier: int
    members: tuple[int, ...]  # places in the caller's list


@dataclass(frozen=True, slots=True)
class Schedule:
    """What the oracle would have run; `value` over n requests is the effective accuracy."""

    value: float
    upper: float  # no schedule is worth more than this
    optimal: bool  # proven: value and upper are one
    batches: tuple[Batch, ...]
    labels: int = 0  # looked at, for the curious

    @property
    def served(self) -> int:
        return sum(len(batch.members) for batch in self.batches)


@dataclass(frozen=True, slots=True)
class Problem:
    """Requests in order of deadline, and what may be run."""

    zero_s: float  # the first arrival, which all other times count from
    arrival_s: Floats  # [n]
    deadline_s: Floats  # [n]
    place: Ints  # [n], in the caller's list
    tier: Ints  # [A], of each (tier, size) worth running
    size: Ints  # [A]
    seconds: Floats  # [A]
    single_s: Floats  # [A], what one alone takes on that tier
    worth: Floats  # [A], accuracy of one member

    @property
    def fastest_s(self) -> float:
        return float(self.seconds.min())


class Outlook(Protocol):
    """What labels may still add: a bound, or a guess where none is at hand."""

    def __call__(self, free_s: Floats, open: Bools) -> Floats:
        """[N], for labels that are free then with [N, n] open."""

    def ahead(self, labels: "Labels", row: Ints, start_s: Floats, there: Bools) -> Floats:
        """[R, A], value and outlook behind each batch at most, of a label's row and a start.

        -inf where fewer are `there` [R, n] than the batch would take.
        """


@dataclass(slots=True)
class Labels:
    """Partial schedules, one a row."""

    free_s: Floats  # [N]
    open: Bools  # [N, n], not served and not too late
    value: Floats  # [N]
    bound: Floats  # [N], value and what may come
    parent: Ints  # [N], node it was reached from
    start_s: Floats  # [N], of the batch that led here
    action: Ints  # [N]

    def __len__(self) -> int:
        return len(self.free_s)

    @classmethod
    def root(cls, problem: Problem, outlook: Outlook) -> Self:
        """Nothing done, at the first arrival that can be served."""
        free_s = np.array([problem.arrival_s.min()])
        open = np.ones((1, len(problem.arrival_s)), dtype=np.bool_)
        nothing = np.zeros(1, dtype=np.int64)
        return cls(
            free_s, open, np.zeros(1), outlook(free_s, open), nothing - 1, np.zeros(1), nothing
        )

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
    """The schedule of most value for requests of [n] arrivals and [n] budgets (from arrival).

    `accuracy` [K] is what one answer of a tier is worth, `seconds` [K, B] what a batch of 1..B
    takes, never less for more. With "count", every answer is worth one. At most `width` labels are
    kept in the time of one fastest batch; beyond, the result may not be proven, and says so.
    """
    problem = pose(times_s, budgets_s, accuracy, seconds, max_batch, objective)
    if not len(problem.arrival_s):
        return Schedule(0.0, 0.0, True, ())
    bound = Bound(problem)
    found = search(problem, bound, FIRST_WIDTH)
    for last in (FIRST_WIDTH, width):
        if not found.optimal:
            bound.settle(found.value)
            found = search(problem, bound, last, found)
    return found


def pose(
    times_s: Sequence[float] | Floats,
    budgets_s: Sequence[float] | Floats,
    accuracy: Sequence[float] | Floats,
    seconds: Sequence[Sequence[float]] | Floats,
    max_batch: int | None = None,
    objective: Objective = "accuracy",
) -> Problem:
    """The one form inside: sorted by deadline, without batches that another outdoes."""
    arrival_s = np.asarray(times_s, dtype=np.float64)
    zero_s = float(arrival_s.min(initial=np.inf))
    arrival_s = arrival_s - zero_s
    deadline_s = arrival_s + np.asarray(budgets_s, dtype=np.float64)
    table_s = np.asarray(seconds, dtype=np.float64)[:, :max_batch]  # [K, B]
    worth = np.asarray(accuracy, dtype=np.float64)
    if (np.diff(table_s, axis=1) < 0).any() or (table_s <= 0).any():
        raise ValueError("seconds must be positive and must not fall as batches grow")
    if objective == "count":
        worth = np.ones_like(worth)
    kept = list[tuple[int, int]]()
    for k, row_s in enumerate(table_s):
        if worth[k] <= 0 or _outdone(k, worth, table_s):
            continue
        for b in range(1, len(row_s) + 1):
            halves_s = row_s[: b - 1] + row_s[: b - 1][::-1]  # 1 + (b - 1), 2 + (b - 2), …
            if b == 1 or row_s[b - 1] < halves_s.min():
                kept.append((k, b))
    tier = np.array([k for k, _ in kept], dtype=np.int64)
    size = np.array([b for _, b in kept], dtype=np.int64)
    took_s = table_s[tier, size - 1]
    order = np.lexsort((arrival_s, deadline_s))
    # those with less time than the fastest batch takes can never be served
    order = order[(deadline_s - arrival_s)[order] >= took_s.min(initial=np.inf) - ROUNDING_S]
    return Problem(
        zero_s,
        arrival_s[order],
        deadline_s[order],
        order.astype(np.int64),
        tier,
        size,
        took_s,
        table_s[tier, 0],
        worth[tier],
    )


def _outdone(k: int, worth: Floats, table_s: Floats) -> bool:
    """Whether another tier is as good and as fast; the first of two alike is not outdone."""
    for other in range(len(worth)):
        if other != k and worth[other] >= worth[k] and (table_s[other] <= table_s[k]).all():
            alike = worth[other] == worth[k] and (table_s[other] == table_s[k]).all()
            if not alike or other < k:
                return True
    return False


class Bound:
    """What may still be had from a time on: prices of requests, and a table over time.

    Every request served costs its price, and may be served as often as wanted. For any prices,
    (what the best path through time earns) + (prices of the open requests) bounds the value.
    Time goes in steps; a batch is taken to start and to end with the step it starts and ends in,
    so that rounding can only raise the bound.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        n = len(problem.arrival_s)
        # nothing idles behind the last arrival, and no batch takes longer than one by one
        last_s = float(problem.arrival_s.max()) + n * float(problem.single_s.max())
        last_s = min(last_s, float(problem.deadline_s.max()))
        self._step_s = max(problem.fastest_s / FINENESS, last_s / MAX_STEPS)
        steps = int(last_s / self._step_s) + 2
        self._lasts = np.maximum(1, problem.seconds // self._step_s).astype(np.int64)  # [A]
        grid_s = np.arange(steps) * self._step_s
        by_arrival = np.argsort(problem.arrival_s, kind="stable")
        self._arrival_rank = np.empty(n, dtype=np.int64)
        self._arrival_rank[by_arrival] = np.arange(n)
        there = np.searchsorted(
            problem.arrival_s[by_arrival], grid_s + self._step_s + ROUNDING_S, side="right"
        )  # [G], how many have come by the step's end
        late = np.searchsorted(
            problem.deadline_s, grid_s[:, None] + problem.seconds - 2 * ROUNDING_S
        )  # [G, A], how many are due before a batch ends
        most = int(problem.size.max())
        self._key = (there[:, None] * (n + 1) + late) * (most + 1) + problem.size  # [G, A]
        self._next = np.minimum(np.arange(steps)[:, None] + self._lasts, steps)  # [G, A]
        self._shape = (n + 1, n + 1, most + 1)
        self.steps = steps
        prices = np.full(n, problem.worth.max() / 2)
        self._keep([(prices, self._path(prices)[0])])

    def __call__(self, free_s: Floats, open: Bools) -> Floats:
        """[N], an upper bound on what labels may still add."""
        step = self._step(free_s)
        left: Floats = (self.tables[:, step] + self.prices @ open.T.astype(np.float64)).min(axis=0)
        return left

    def ahead(self, labels: Labels, row: Ints, start_s: Floats, there: Bools) -> Floats:
        """[R, A], a bound on where each batch leads, as if it took the cheapest that are there.

        Rows are a label and a start; -inf where too few are `there` [R, n]. Quick, and not sharp.
        """
        problem, prices = self._problem, self.prices[0]
        low = np.where(there, prices, np.inf)
        low.sort(axis=1)
        cost = np.full((len(row), self._shape[2]), np.inf)
        known = min(self._shape[2], low.shape[1] + 1) - 1
        cost[:, 1 : known + 1] = low[:, :known].cumsum(axis=1)
        rest = labels.value[row] + labels.open[row] @ prices
        after = self.tables[0][self._step(start_s[:, None] + problem.seconds)]
        total: Floats = problem.size * problem.worth + after - cost[:, problem.size] + rest[:, None]
        return total

    def settle(self, known: float) -> None:
        """Move the prices to where the bound is low: Polyak's steps; keep the lowest few."""
        prices = self.prices[0].copy()
        ceiling = self._problem.worth.max()
        found = list[tuple[float, Floats, Floats]]()
        pace, stale, lowest = 1.0, 0, np.inf
        for _ in range(ROUNDS):
            table, choice, reach = self._path(prices)
            total = float(prices.sum() + table[0])
            found.append((total, prices.copy(), table))
            if total < lowest - 1e-6:
                lowest, stale = total, 0
            else:
                stale += 1
                if stale >= 4:
                    pace, stale = pace / 2, 0
            slope = 1.0 - self._served(prices, table, choice, reach)
            free = ~((prices <= 0) & (slope > 0))
            norm = float((slope[free] ** 2).sum())
            if not norm or total - known <= TOLERANCE:
                break
            prices = prices - pace * max(total - known, 1e-4) / norm * slope
            prices = np.clip(prices, 0.0, ceiling)
        found.sort(key=lambda one: one[0])
        self._keep([(prices, table) for _, prices, table in found[:KEPT]])

    def _keep(self, found: list[tuple[Floats, Floats]]) -> None:
        """Use these (prices, table), and prices that say: each as good as the best tier."""
        ceiling = np.full(len(self._problem.arrival_s), self._problem.worth.max())
        self.prices = np.array([prices for prices, _ in found] + [ceiling])  # [P, n]
        # [P, G + 1], what the best path earns from a step on
        self.tables = np.array([table for _, table in found] + [np.zeros(self.steps + 1)])

    def _step(self, at_s: Floats) -> Ints:
        """The step of a time, or the one before where rounding could tell."""
        step: Ints = (at_s / self._step_s - 1e-6).astype(np.int64)
        return np.minimum(step, self.steps)

    def _path(self, prices: Floats) -> tuple[Floats, Ints, Floats]:
        """([G + 1] best earned from a step on, [G] action there, [G] earned if it is taken)."""
        problem, steps = self._problem, self.steps
        cost = self._cheapest(prices).ravel()
        gain = problem.size * problem.worth - cost[self._key]  # [G, A]
        table = np.zeros(steps + 1)
        choice = np.zeros(steps, dtype=np.int64)
        reach = np.zeros(steps)
        stride = int(self._lasts.min())  # steps that cannot follow one another
        for end in range(steps, 0, -stride):
            start = max(0, end - stride)
            total = gain[start:end] + table[self._next[start:end]]
            choice[start:end] = total.argmax(axis=1)
            reach[start:end] = total.max(axis=1)
            run = np.maximum.accumulate(np.append(table[end], reach[start:end][::-1]))
            table[start:end] = run[1:][::-1]
        return table, choice, reach

    def _cheapest(self, prices: Floats) -> Floats:
        """[n + 1, n + 1, B + 1]: sum of the b lowest prices of the first i come, but j due."""
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
        """[n], how often the best path serves each request."""
        problem = self._problem
        served = np.zeros(len(prices))
        order = np.argsort(prices, kind="stable")
        step = 0
        while step < self.steps and table[step] > 0:
            ahead = int(np.argmax(reach[step:] >= table[step]))
            step += ahead
            action = choice[step]
            there, rest = divmod(int(self._key[step, action]), self._shape[1] * self._shape[2])
            late = rest // self._shape[2]
            fits = order[(self._arrival_rank[order] < there) & (order >= late)]
            served[fits[: problem.size[action]]] += 1
            step = int(self._next[step, action])
        return served


def search(problem: Problem, bound: Bound, width: int, known: Schedule | None = None) -> Schedule:
    """Labels in order of time, at most `width` of them in the time of one fastest batch."""
    fastest_s = problem.fastest_s
    value = known.value if known else 0.0
    lost = -np.inf  # highest bound of those left out
    best_node = -1
    nodes = list[tuple[Ints, Floats, Ints]]()  # parent, start_s, action of every label kept
    count = looked = 0
    waiting: dict[int, list[Labels]] = {0: [Labels.root(problem, bound)]}
    while waiting:
        now = min(waiting)
        labels = Labels.join(waiting.pop(now))
        looked += len(labels)
        labels = labels.take(labels.bound > value + TOLERANCE)
        labels = labels.take(undominated(problem, labels))
        if len(labels) > width:
            order = np.argsort(-labels.bound, kind="stable")
            lost = max(lost, float(labels.bound[order[width]]))
            labels = labels.take(np.sort(order[:width]))
        if not len(labels):
            continue
        nodes.append((labels.parent, labels.start_s, labels.action))
        children = expand(problem, bound, labels, count, value)
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
        bucket = np.maximum((children.free_s / fastest_s).astype(np.int64), now + 1)
        for one in np.unique(bucket):
            waiting.setdefault(int(one), []).append(children.take(bucket == one))
    upper = max(value, lost) if known is None else max(value, min(lost, known.upper))
    proven = upper <= value + TOLERANCE
    looked += known.labels if known else 0
    if best_node < 0:
        return Schedule(value, upper, proven, known.batches if known else (), looked)
    return Schedule(value, upper, proven, _trace(problem, nodes, best_node), looked)


def undominated(problem: Problem, labels: Labels) -> Ints:
    """Rows that no other row makes superfluous."""
    packed = np.packbits(labels.open, axis=1)
    order = np.lexsort((-labels.value, labels.free_s, *packed.T))
    # of equal sets, in order of time: only those of more value than all before
    same = (packed[order][1:] == packed[order][:-1]).all(axis=1)
    group = np.concatenate(([0], np.cumsum(~same))) if len(order) else np.zeros(0)
    ceiling = 2.0 * (1.0 + len(problem.arrival_s)) * max(1.0, float(problem.worth.max()))
    stacked = labels.value[order] + group * ceiling
    before = np.concatenate(([-np.inf], np.maximum.accumulate(stacked)[:-1]))
    rows = order[stacked > before + TOLERANCE] if len(order) else order
    if len(rows) < 2:
        return rows
    rows = rows[np.lexsort((labels.free_s[rows], -labels.bound[rows]))]
    left = labels.open[rows][:, ::-1].cumsum(axis=1, dtype=np.int16)  # [N, n], due so late or later
    free_s, value = labels.free_s[rows], labels.value[rows]
    best = float(problem.worth.max())
    alive = np.ones(len(rows), dtype=np.bool_)
    for x in range(min(DOMINATORS, len(rows))):
        if not alive[x]:
            continue
        rivals = np.nonzero(alive & (free_s >= free_s[x]) & (value <= value[x] + TOLERANCE / 2))[0]
        lacks = (left[rivals] - left[x]).max(axis=1).clip(0)
        beaten = rivals[value[rivals] + best * lacks <= value[x] + TOLERANCE / 2]
        alive[beaten[beaten != x]] = False
    return np.sort(rows[alive])


def expand(problem: Problem, outlook: Outlook, labels: Labels, first: int, value: float) -> Labels:
    """All batches that may come next, one a row; nodes of the labels count from `first`."""
    arrival_s, deadline_s, fastest_s = problem.arrival_s, problem.deadline_s, problem.fastest_s
    moments_s = np.unique(arrival_s)  # [M]
    # [N, 1 + M]: at once, or with an arrival; by then, what is there could have been served alone
    starts_s = np.concatenate(
        (labels.free_s[:, None], np.broadcast_to(moments_s, (len(labels), len(moments_s)))), axis=1
    )
    free_s = labels.free_s[:, None]
    soon = (starts_s > free_s) & (starts_s < free_s + problem.single_s.max())
    soon[:, 0] = True
    row, moment = np.nonzero(soon)
    start_s = starts_s[row, moment]
    there = labels.open[row] & (arrival_s <= start_s[:, None])  # [R, n]
    pick, action = np.nonzero(outlook.ahead(labels, row, start_s, there) > value + TOLERANCE)
    row, moment, start_s, there = row[pick], moment[pick], start_s[pick], there[pick]
    end_s = start_s + problem.seconds[action]
    fits = there & (deadline_s >= end_s[:, None] - ROUNDING_S)  # [C, n]
    taken = fits & (fits.cumsum(axis=1, dtype=np.int16) <= problem.size[action][:, None])
    whole = taken.sum(axis=1) == problem.size[action]
    newest = (taken & (arrival_s == start_s[:, None])).any(axis=1)
    since_s = np.maximum(arrival_s, labels.free_s[row][:, None])
    idle = (taken & (since_s + problem.single_s[action][:, None] <= start_s[:, None])).any(axis=1)
    good = whole & ((moment == 0) | (newest & ~idle))
    row, start_s, end_s, action, taken = (
        row[good], start_s[good], end_s[good], action[good], taken[good],
    )  # fmt: skip
    earned = labels.value[row] + problem.size[action] * problem.worth[action]
    ready_s = np.maximum(end_s[:, None], arrival_s)
    open = labels.open[row] & ~taken & (deadline_s >= ready_s + fastest_s - ROUNDING_S)
    next_s = np.where(open, ready_s, np.inf).min(axis=1, initial=np.inf)
    free_s = np.where(np.isfinite(next_s), next_s, end_s)  # on to the next arrival if none is there
    return Labels(
        free_s, open, earned, earned + outlook(free_s, open), row + first, start_s, action
    )


def _trace(
    problem: Problem, nodes: list[tuple[Ints, Floats, Ints]], node: int
) -> tuple[Batch, ...]:
    """The batches that lead to a node, members filled in anew."""
    parent = np.concatenate([one[0] for one in nodes])
    start_s = np.concatenate([one[1] for one in nodes])
    action = np.concatenate([one[2] for one in nodes])
    steps = list[int]()
    while parent[node] >= 0:
        steps.append(node)
        node = int(parent[node])
    open = np.ones(len(problem.arrival_s), dtype=np.bool_)
    batches = list[Batch]()
    for step in reversed(steps):
        begin_s, a = float(start_s[step]), int(action[step])
        end_s = begin_s + float(problem.seconds[a])
        fits = open & (problem.arrival_s <= begin_s) & (problem.deadline_s >= end_s - ROUNDING_S)
        members = np.nonzero(fits)[0][: problem.size[a]]
        open[members] = False
        places = tuple(int(place) for place in problem.place[members])
        start, end = problem.zero_s + begin_s, problem.zero_s + end_s
        batches.append(Batch(start, end, int(problem.tier[a]), places))
    return tuple(batches)
