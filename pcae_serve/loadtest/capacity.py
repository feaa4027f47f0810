"""Load 1.0: the most requests a second that a clairvoyant schedule answers in time.

On the fastest tier alone, with all arrivals known, at least `target` of them by their deadlines.
A long trace is too much for an exact search, so this is the oracle's search with few labels kept
at a time, led by a guess instead of a bound: the rate is a lower bound on what could be had of that
trace (by how much is not known; more width mostly raises it). It knows no policy, and one device.

The trace is a Poisson one of so many requests in just the time that the rate gives them, and the
same but for its scale at every rate. Nothing may be put off beyond its end, so that a loose budget
does not hide work that no steady traffic would leave time for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pcae_serve.loadtest.clairvoyant import (
    Bools,
    Floats,
    Ints,
    Labels,
    Problem,
    expand,
    pose,
    undominated,
)

#: What an open request is worth to the guess: the share of its answer that it does not cost.
PRICE = 0.8
#: Labels kept per label wanted, until all of their time are there.
SPARE = 4


def capacity(
    budgets_s: Sequence[float],
    shares: Sequence[float],
    seconds: Sequence[Sequence[float]] | Floats,
    *,
    max_batch: int | None = None,
    target: float = 0.99,
    requests: int = 2000,
    width: int = 24,
    precision: float = 0.01,
    seed: int = 0,
) -> float:
    """Requests a second, to within `precision` of itself; 0.0 where no rate will do.

    `budgets_s` come with `shares` (any scale); `seconds` [K, B] as for the oracle.
    """
    fastest_s = fastest(seconds, max_batch)
    trace = draw(budgets_s, shares, requests, seed)
    if (trace.budget_s >= fastest_s[0]).mean() < target:
        return 0.0
    # a device that does nothing but full batches, and the share that need not be served
    low, high = 0.0, float((np.arange(1, len(fastest_s) + 1) / fastest_s).max()) / target
    rate = high
    while high - low > precision * low:
        if answered(trace, rate, fastest_s, width) >= target:
            low = rate
        else:
            high = rate
        rate = (low + high) / 2
    return low


def fastest(seconds: Sequence[Sequence[float]] | Floats, max_batch: int | None = None) -> Floats:
    """[B], the batch times of the tier that is fastest with full batches."""
    table_s = np.asarray(seconds, dtype=np.float64)[:, :max_batch]
    row_s: Floats = table_s[table_s[:, -1].argmin()]
    return row_s


@dataclass(frozen=True, slots=True)
class Trace:
    """Arrivals as shares of the time that all take, and a budget for each."""

    at: Floats  # [n], in 0..1, rising
    budget_s: Floats  # [n]


def draw(budgets_s: Sequence[float], shares: Sequence[float], requests: int, seed: int) -> Trace:
    """A Poisson trace, given how many come."""
    rng = np.random.default_rng(seed)
    at = np.sort(rng.random(requests))
    weight = np.asarray(shares, dtype=np.float64)
    return Trace(
        at, rng.choice(np.asarray(budgets_s, dtype=np.float64), requests, p=weight / weight.sum())
    )


def answered(trace: Trace, rate: float, seconds: Floats, width: int = 24) -> float:
    """The share of the trace that a clairvoyant schedule answers in time, at least."""
    n = len(trace.at)
    time_s = trace.at * (n / rate)
    end_s = n / rate + trace.budget_s.min()
    budget_s = np.minimum(trace.budget_s, end_s - time_s)
    return _most(pose(time_s, budget_s, [1.0], seconds[None]), width) / n


class _Guess:
    """What labels may lead to, roughly: open requests at a price, time at what it could serve."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._pace = float((problem.size / problem.seconds).max()) * (1 - PRICE)

    def __call__(self, free_s: Floats, open: Bools) -> Floats:
        guess: Floats = PRICE * open.sum(axis=1) - self._pace * free_s
        return guess

    def ahead(self, labels: Labels, row: Ints, start_s: Floats, there: Bools) -> Floats:
        return np.where(there.sum(axis=1)[:, None] >= self._problem.size, np.inf, -np.inf)


def _most(problem: Problem, width: int) -> float:
    """How many are answered in time by the best schedule found."""
    n = len(problem.arrival_s)
    if not n:
        return 0.0
    guess = _Guess(problem)
    fastest_s, longest_s = problem.fastest_s, float(problem.seconds.max())
    arrivals_s = np.sort(problem.arrival_s)
    most = 0.0
    waiting: dict[int, list[Labels]] = {0: [Labels.root(problem, guess)]}
    while waiting:
        now = min(waiting)
        labels = Labels.join(waiting.pop(now))
        # those that can matter until the next batch ends, and the first to come behind it
        until_s = float(labels.free_s.max()) + fastest_s + longest_s
        behind = min(int(np.searchsorted(arrivals_s, until_s, side="right")), n - 1)
        near = np.nonzero((problem.arrival_s <= arrivals_s[behind]) & labels.open.any(axis=0))[0]
        part = replace(
            problem,
            arrival_s=problem.arrival_s[near],
            deadline_s=problem.deadline_s[near],
            place=problem.place[near],
        )
        whole = labels.open
        labels.open = whole[:, near]
        rows = undominated(part, labels)
        rows = rows[np.argsort(-labels.bound[rows], kind="stable")[:width]]
        labels, whole = labels.take(rows), whole[rows]
        children = expand(part, guess, labels, 0, -np.inf)
        if not len(children):
            continue
        most = max(most, float(children.value.max()))
        bucket = np.maximum((children.free_s / fastest_s).astype(np.int64), now + 1)
        for one in np.unique(bucket):
            picked = np.nonzero(bucket == one)[0]
            order = np.argsort(-children.bound[picked], kind="stable")[: SPARE * width]
            kept = children.take(picked[order])
            open = whole[kept.parent]
            open[:, near] = kept.open
            # the guess of the part is lower for all by what lies outside of it
            kept.bound += PRICE * (open.sum(axis=1) - kept.open.sum(axis=1))
            kept.open = open
            kept = kept.take(np.nonzero(open.any(axis=1))[0])
            if len(kept):
                waiting.setdefault(int(one), []).append(kept)
    return most
