"""How requests arrive: their rate, how they cluster, and how budgets are spread among them.

Counts in windows of many lengths, taken at each arrival, make an arrival curve: how many more are
to be expected within a time of one that has just come, and how much that number scatters. Averages
run over requests, not seconds, so that they are as quick as the load. It knows times and budgets,
nothing of tiers or queues.
"""

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from math import floor, log, sqrt

#: Lengths of the windows that arrivals are counted in, seconds: 0.3 ms to 6 s.
WINDOWS_S = tuple(0.0003 * 3**i for i in range(10))
#: Arrival times kept; where a window would hold more, its count is drawn out from these.
KEPT = 1024
#: Requests that the rate is taken over, and fewer than which say nothing of it.
RATE_OVER, RATE_LEAST = 64, 8
#: Weight of the newest request in all averages: about as many count as for the rate. How longer
#: windows than that scatter is underestimated: they hold mostly the same requests.
WEIGHT = 1 / RATE_OVER
#: Budgets within a factor of this count as one class, and at most so many classes are told apart.
BUDGET_STEP, MAX_CLASSES = 1.25, 6
#: Nobody can be served in less; a budget that is nothing would be divided by.
LEAST_BUDGET_S = 1e-6
#: A class of fewer requests counts with the next looser one.
LEAST_SHARE = 0.02
#: What is due by when is tabled for so many horizons, anew after so many arrivals.
HORIZONS, RENEW = 24, 16


@dataclass(frozen=True, slots=True)
class BudgetClass:
    """Requests of about one budget."""

    budget_s: float  # their mean
    share: float  # of all requests


class Arrivals:
    """Rate, clustering and budgets of the requests offered, refused ones included."""

    def __init__(self) -> None:
        self._times_s: list[float] = []
        self._mean = [0.0] * len(WINDOWS_S)  # requests in a window that ends at an arrival
        self._variance = [0.0] * len(WINDOWS_S)
        self._budgets: dict[int, tuple[float, float]] = {}  # step -> share, mean seconds
        self._seen = 0
        self._classes: tuple[BudgetClass, ...] | None = None
        self._due: _Due | None = None

    def observe(self, now_s: float, budget_s: float) -> None:
        """A request was offered."""
        budget_s = max(budget_s, LEAST_BUDGET_S)
        weight = max(WEIGHT, 1 / (self._seen + 1))
        self._count(now_s, weight)
        self._sort_in(budget_s, weight)
        self._seen += 1
        if self._seen % RENEW == 1:
            self._classes = self._due = None

    def rate(self, now_s: float) -> float:
        """Requests a second over the last RATE_OVER; the silence since the last one counts."""
        count = min(RATE_OVER, len(self._times_s))
        if count < RATE_LEAST:
            return 0.0
        return count / max(now_s - self._times_s[-count], 1e-9)

    @property
    def classes(self) -> tuple[BudgetClass, ...]:
        """The budgets seen, the tightest first, their shares summing to one; none before any."""
        if self._classes is None:
            self._classes = _merge(
                [BudgetClass(mean_s, share) for _, (share, mean_s) in sorted(self._budgets.items())]
            )
        return self._classes

    def within(self, seconds: float) -> tuple[float, float]:
        """Mean and variance of how many arrive within `seconds` of an arrival."""
        first, last = WINDOWS_S[0], WINDOWS_S[-1]
        if not first < seconds < last:
            times = seconds / (first if seconds <= first else last)
            end = 0 if seconds <= first else -1
            return self._mean[end] * times, self._variance[end] * times
        j = bisect_left(WINDOWS_S, seconds)
        part = (seconds - WINDOWS_S[j - 1]) / (WINDOWS_S[j] - WINDOWS_S[j - 1])
        return _between(self._mean, j, part), _between(self._variance, j, part)

    def due(self, within_s: float) -> tuple[float, float]:
        """Of those still to come, how many are due within that time: mean, standard deviation."""
        if self._due is None:
            if not self.classes:
                return 0.0, 0.0
            self._due = _Due(self)
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
            off = count - self._mean[j]
            self._mean[j] += weight * off
            self._variance[j] += weight * (off * off * (1 - weight) - self._variance[j])
        times_s.append(now_s)
        if len(times_s) > 2 * KEPT:
            del times_s[: -KEPT - 1]

    def _sort_in(self, budget_s: float, weight: float) -> None:
        step = floor(log(budget_s, BUDGET_STEP))
        for other, (share, mean_s) in self._budgets.items():
            self._budgets[other] = share * (1 - weight), mean_s
        share, mean_s = self._budgets.get(step, (0.0, budget_s))
        mean_s += max(weight, 0.05) * (budget_s - mean_s)
        self._budgets[step] = share + weight, mean_s
        if self._seen % (RENEW * KEPT) == 0:  # what has not been asked for in a long time
            self._budgets = {s: b for s, b in self._budgets.items() if b[0] > 1e-9}


class _Due:
    """Arrivals still to come, by the horizon they are due within: lines between points."""

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
                # clusters come at once: however short the time, it may hold the first of them
                m, v = arrivals.within(max(horizon_s - c.budget_s, WINDOWS_S[0]))
                mean += c.share * m
                variance += c.share**2 * v + c.share * (1 - c.share) * m  # a thinned count
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
        return _between(self._mean, j, part), _between(self._deviation, j, part)


def _between(values: list[float], j: int, part: float) -> float:
    return values[j - 1] + part * (values[j] - values[j - 1])


def _merge(classes: list[BudgetClass]) -> tuple[BudgetClass, ...]:
    """At most MAX_CLASSES, none but the last below LEAST_SHARE."""
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
        # the few that are tighter than the rest must not bind it: they count as one of them
        few = one.share < LEAST_SHARE
        both_s = (one.share * one.budget_s + two.share * two.budget_s) / share
        mean_s = two.budget_s if few else both_s
        merged[small : small + 2] = [BudgetClass(mean_s, share)]
    return tuple(merged)
