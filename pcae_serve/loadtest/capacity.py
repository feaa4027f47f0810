"""Compute load 1: the highest rate at which a clairvoyant schedule answers enough requests in time.

The schedule uses one device and its fastest tier, knows all arrivals in advance, and must answer at
least the share `target` of the requests by their deadlines. It comes from a beam search, so the
rate is a lower bound.

The trace is a Poisson process of a fixed number of requests in the time that the rate implies; at
another rate it is the same trace, scaled. No request may be answered later than the shortest budget
after the last arrival: otherwise long budgets would move work into idle time that steady traffic
does not have.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pcae_serve.loadtest.clairvoyant import Floats, make_problem, most_answered


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
    """Return requests per second, to a relative `precision`; 0.0 if no rate reaches the target.

    budgets_s: drawn in proportion to `shares`. seconds [tiers, B]: of batches of 1 to B requests.
    """
    fastest_s = fastest_tier(seconds, max_batch)
    trace = draw_trace(budgets_s, shares, requests, seed)
    if (trace.budget_s >= fastest_s[0]).mean() < target:
        return 0.0
    # upper limit: the best batch size all the time, and none of the requests that may be missed
    low, high = 0.0, float((np.arange(1, len(fastest_s) + 1) / fastest_s).max()) / target
    rate = high
    while high - low > precision * low:
        if share_answered(trace, rate, fastest_s, width) >= target:
            low = rate
        else:
            high = rate
        rate = (low + high) / 2
    return low


def fastest_tier(
    seconds: Sequence[Sequence[float]] | Floats, max_batch: int | None = None
) -> Floats:
    """Return the batch times [B] of the tier with the fastest full batch."""
    table_s = np.asarray(seconds, dtype=np.float64)[:, :max_batch]
    row_s: Floats = table_s[table_s[:, -1].argmin()]
    return row_s


@dataclass(frozen=True, slots=True)
class Trace:
    """Arrivals as fractions of the trace's length, with a budget each."""

    at: Floats  # [n], in 0..1, ascending
    budget_s: Floats  # [n]


def draw_trace(
    budgets_s: Sequence[float], shares: Sequence[float], requests: int, seed: int
) -> Trace:
    """Return a Poisson trace, given the number of requests."""
    rng = np.random.default_rng(seed)
    at = np.sort(rng.random(requests))
    weight = np.asarray(shares, dtype=np.float64)
    return Trace(
        at, rng.choice(np.asarray(budgets_s, dtype=np.float64), requests, p=weight / weight.sum())
    )


def share_answered(trace: Trace, rate: float, seconds: Floats, width: int = 24) -> float:
    """Return the share of the trace that the schedule found answers in time: a lower bound."""
    n = len(trace.at)
    time_s = trace.at * (n / rate)
    end_s = n / rate + trace.budget_s.min()
    budget_s = np.minimum(trace.budget_s, end_s - time_s)
    return most_answered(make_problem(time_s, budget_s, [1.0], seconds[None]), width) / n
