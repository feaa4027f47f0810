"""Arrival statistics: the rate of requests, their burstiness, and the distribution of budgets.

At each arrival, the preceding requests are counted in windows of several lengths. The running mean
and variance of these counts estimate how many requests follow an arrival within a time. Averages
run over requests, not seconds, so that they adapt faster under higher load.
"""

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from math import floor, log, sqrt

#: Window lengths in seconds: 0.3 ms to 6 s.
WINDOWS_S = tuple(0.0003 * 3**i for i in range(10))
#: Arrival times stored; the count of a window with more requests is extrapolated from these.
KEPT = 1024
#: Requests that the rate is computed over, and the least number needed for a rate.
RATE_OVER, RATE_LEAST = 64, 8
#: Weight of the newest request in all averages. The variance of windows with more than RATE_OVER
#: requests is underestimated: successive counts share most of their requests.
WEIGHT = 1 / RATE_OVER
#: Budgets within this factor form one class; the largest number of classes.
BUDGET_STEP, MAX_CLASSES = 1.25, 6
#: Lower limit of a budget, which is a divisor.
LEAST_BUDGET_S = 1e-6
#: A class with a smaller share is merged into the class of the next larger budget.
LEAST_SHARE = 0.02
#: Points of the table of due requests, and arrivals after which it is recomputed.
HORIZONS, RENEW = 24, 16


@dataclass(frozen=True, slots=True)
class BudgetClass:
    """Requests with similar budgets."""

    budget_s: float  # mean
    share: float  # of all requests


class Arrivals:
    """Rate, burstiness and budgets of the offered requests, rejected ones included."""

    def __init__(self) -> None:
        self._times_s: list[float] = []
        self._mean = [0.0] * len(WINDOWS_S)  # requests in a window that ends at an arrival
        self._variance = [0.0] * len(WINDOWS_S)
        self._budgets: dict[int, tuple[float, float]] = {}  # step -> share, mean seconds
        self._seen = 0
        self._classes: tuple[BudgetClass, ...] | None = None
        self._due: _DueTable | None = None

    def observe(self, now_s: float, budget_s: float) -> None:
        """Record an offered request."""
        budget_s = max(budget_s, LEAST_BUDGET_S)
        weight = max(WEIGHT, 1 / (self._seen + 1))
        self._count(now_s, weight)
        self._add_budget(budget_s, weight)
        self._seen += 1
        if self._seen % RENEW == 1:
            self._classes = self._due = None

    def rate(self, now_s: float) -> float:
        """Return requests per second over the last RATE_OVER requests, up to `now_s`."""
        count = min(RATE_OVER, len(self._times_s))
        if count < RATE_LEAST:
            return 0.0
        return count / max(now_s - self._times_s[-count], 1e-9)

    @property
    def classes(self) -> tuple[BudgetClass, ...]:
        """Budget classes, smallest budget first, with shares that sum to 1; empty at first."""
        if self._classes is None:
            self._classes = _merge(
                [BudgetClass(mean_s, share) for _, (share, mean_s) in sorted(self._budgets.items())]
            )
        return self._classes

    def count_within(self, seconds: float) -> tuple[float, float]:
        """Return mean and variance of the number of arrivals within `seconds` after an arrival."""
        first, last = WINDOWS_S[0], WINDOWS_S[-1]
        if not first < seconds < last:
            times = seconds / (first if seconds <= first else last)
            end = 0 if seconds <= first else -1
            return self._mean[end] * times, self._variance[end] * times
        j = bisect_left(WINDOWS_S, seconds)
        part = (seconds - WINDOWS_S[j - 1]) / (WINDOWS_S[j] - WINDOWS_S[j - 1])
        return _interpolate(self._mean, j, part), _interpolate(self._variance, j, part)

    def count_due(self, within_s: float) -> tuple[float, float]:
        """Return mean and standard deviation of the future arrivals due within `within_s`."""
        if self._due is None:
            if not self.classes:
                return 0.0, 0.0
            self._due = _DueTable(self)
        return self._due.at(within_s)

    def _count(self, now_s: float, weight: float) -> None:
        times_s = self._times_s
        kept = len(times_s)
        for j, window_s in enumerate(WINDOWS_S):
            since_s = now_s - window_s
            if kept > KEPT and times_s[0] > since_s:
                count = kept * window_s / max(now_s - times_s[0], 1e-9)
            else:
                count = kept - bisect_left(times_s, since_s)
            error = count - self._mean[j]
            self._mean[j] += weight * error
            self._variance[j] += weight * (error * error * (1 - weight) - self._variance[j])
        times_s.append(now_s)
        if len(times_s) > 2 * KEPT:
            del times_s[: -KEPT - 1]

    def _add_budget(self, budget_s: float, weight: float) -> None:
        step = floor(log(budget_s, BUDGET_STEP))
        for other, (share, mean_s) in self._budgets.items():
            self._budgets[other] = share * (1 - weight), mean_s
        share, mean_s = self._budgets.get(step, (0.0, budget_s))
        mean_s += max(weight, 0.05) * (budget_s - mean_s)
        self._budgets[step] = share + weight, mean_s
        if self._seen % (RENEW * KEPT) == 0:  # forget budgets that are no longer used
            self._budgets = {s: b for s, b in self._budgets.items() if b[0] > 1e-9}


class _DueTable:
    """Table of the future arrivals that are due within a horizon, interpolated linearly."""

    def __init__(self, arrivals: Arrivals) -> None:
        classes = arrivals.classes
        first_s, last_s = classes[0].budget_s, classes[-1].budget_s * 1.1
        ratio = (last_s / first_s) ** (1 / (HORIZONS - 1))
        steps = {first_s * ratio**i for i in range(HORIZONS)}
        edges = {c.budget_s for c in classes} | {c.budget_s * 1.0001 for c in classes}
        self._horizons_s = sorted(steps | edges)
        self._mean, self._deviation = list[float](), list[float]()
        for horizon_s in self._horizons_s:
            mean = variance = 0.0
            for c in classes:
                if c.budget_s >= horizon_s:
                    break
                # even the shortest time can contain the start of a burst
                m, v = arrivals.count_within(max(horizon_s - c.budget_s, WINDOWS_S[0]))
                mean += c.share * m
                variance += (
                    c.share**2 * v + c.share * (1 - c.share) * m
                )  # variance of a thinned count
            self._mean.append(mean)
            self._deviation.append(sqrt(variance))

    def at(self, within_s: float) -> tuple[float, float]:
        j = bisect_left(self._horizons_s, within_s)
        if j == 0:
            return 0.0, 0.0
        if j == len(self._horizons_s):
            return self._mean[-1], self._deviation[-1]
        low_s, high_s = self._horizons_s[j - 1], self._horizons_s[j]
        part = (within_s - low_s) / (high_s - low_s)
        return _interpolate(self._mean, j, part), _interpolate(self._deviation, j, part)


def _interpolate(values: list[float], j: int, part: float) -> float:
    return values[j - 1] + part * (values[j] - values[j - 1])


def _merge(classes: list[BudgetClass]) -> tuple[BudgetClass, ...]:
    """Merge neighbouring classes: at most MAX_CLASSES, only the last one below LEAST_SHARE."""
    merged = list(classes)
    while len(merged) > 1:
        small = next((i for i, c in enumerate(merged[:-1]) if c.share < LEAST_SHARE), None)
        if small is None:
            if len(merged) <= MAX_CLASSES:
                break
            shares = [one.share + two.share for one, two in pairwise(merged)]
            small = shares.index(min(shares))
        one, two = merged[small], merged[small + 1]
        share = one.share + two.share
        # a few smaller budgets must not determine the class: it keeps the larger one's mean
        few = one.share < LEAST_SHARE
        both_s = (one.share * one.budget_s + two.share * two.budget_s) / share
        mean_s = two.budget_s if few else both_s
        merged[small : small + 2] = [BudgetClass(mean_s, share)]
    return tuple(merged)
