"""Latency model: measured quantiles per (tier, batch size), corrected by observed batches.

    Latency    learns one factor for the machine, one per tier, and the spread (p99 / median)
    Forecast   a snapshot: predicted median and p99 seconds of a batch

It has no clock: times are arguments.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np
from numpy.typing import NDArray

#: Weight of the newest batch in the machine's factor: 50 % of a change in 3 batches, 99 % in 20.
MACHINE_WEIGHT = 0.2
#: Weight of the newest batch in a tier's own factor, which follows more slowly.
TIER_WEIGHT = 0.05
#: Half-life of a slowdown while no batches run, so that a disturbance does not cause rejections
#: long after it.
HALF_LIFE_S = 20.0
#: A single batch can raise the factors at most this many times.
MAX_SLOWDOWN = 10.0
#: A batch is useful if its cost per image is within 10 % of the best batch's.
BATCH_GAIN = 0.10
#: A batch is efficient if its cost per image is within 5 % of the best batch's.
EFFICIENT_GAIN = 0.05
#: The quantile that deadlines are planned with.
QUANTILE = 0.99
#: Step of the running p99, in log seconds: up by 0.99 of it for a slower batch, else down by 0.01.
TAIL_STEP = 0.05
#: Upper limit of p99 / median.
MAX_TAIL = 3.0


@dataclass(frozen=True)
class Seconds:
    """Latency quantiles of one (tier, batch size)."""

    p50: float
    p99: float


class Latency:
    """Predicts batch latencies and learns from observed ones; tiers in the bundle's order."""

    def __init__(self, points: Sequence[Mapping[int, Seconds]], max_batch: int) -> None:
        """points: for each tier, measured quantiles by batch size, interpolated linearly."""
        self._median = [_table({b: s.p50 for b, s in tier.items()}, max_batch) for tier in points]
        # p99 / median, the mean over each tier's points
        self._tail = [
            float(np.mean([min(max(1.0, s.p99 / s.p50), MAX_TAIL) for s in tier.values()]))
            for tier in points
        ]
        self._useful = [_useful_batch(median) for median in self._median]
        self._efficient = [_efficient_batch(median) for median in self._median]
        self._idle = [
            median[1] * tail for median, tail in zip(self._median, self._tail, strict=True)
        ]
        self._log_tail = [log(tail) for tail in self._tail]
        self._machine, self._tier = 1.0, [1.0] * len(points)
        self._observed_s = 0.0

    def forecast(self, now_s: float) -> "Forecast":
        """Return predictions for batches that start now."""
        machine, tiers = self._factors(now_s)
        factors = [machine * tier for tier in tiers]
        return Forecast(self._median, factors, self._tail, self._useful, self._efficient)

    def idle(self, tier: int) -> float:
        """Return the p99 seconds of one image on an idle machine, as measured."""
        return self._idle[tier]

    def observe(self, tier: int, batch: int, seconds: float, now_s: float) -> None:
        """Learn from a batch that took `seconds`."""
        machine, tiers = self._factors(now_s)
        ratio = min(seconds / self._median[tier][batch], MAX_SLOWDOWN * machine)
        self._log_tail[tier] += TAIL_STEP * (
            QUANTILE if ratio > machine * tiers[tier] * self._tail[tier] else QUANTILE - 1
        )
        self._log_tail[tier] = min(max(self._log_tail[tier], 0.0), log(MAX_TAIL))
        self._tail[tier] = exp(self._log_tail[tier])
        self._machine = machine + MACHINE_WEIGHT * (ratio / tiers[tier] - machine)
        tiers[tier] += TIER_WEIGHT * (ratio / machine - tiers[tier])
        self._tier, self._observed_s = tiers, now_s

    def _factors(self, now_s: float) -> tuple[float, list[float]]:
        """Return the machine's factor and the tiers', decayed over the time without batches."""
        decay = 0.5 ** (max(0.0, now_s - self._observed_s) / HALF_LIFE_S)
        # a factor below 1 does not decay: it causes no rejections
        factors = [f if f <= 1 else 1 + (f - 1) * decay for f in (self._machine, *self._tier)]
        return factors[0], factors[1:]


class Forecast:
    """Predicted seconds of batches that start at one moment."""

    __slots__ = ("_efficient", "_factors", "_median", "_tail", "_useful")

    def __init__(
        self,
        median: Sequence[Sequence[float]],
        factors: Sequence[float],
        tail: Sequence[float],
        useful: Sequence[int],
        efficient: Sequence[int],
    ) -> None:
        self._median, self._factors, self._tail = median, factors, tail
        self._useful, self._efficient = useful, efficient

    def p50(self, tier: int, batch: int) -> float:
        """Return the predicted median seconds of a batch."""
        return self._median[tier][batch] * self._factors[tier]

    def p99(self, tier: int, batch: int) -> float:
        """Return the predicted 99th percentile, which deadlines are planned with."""
        return self._median[tier][batch] * self._factors[tier] * self._tail[tier]

    def useful_batch(self, tier: int) -> int:
        """Return the batch size beyond which the cost per image hardly falls."""
        return self._useful[tier]

    def efficient_batch(self, tier: int) -> int:
        """Return the batch size beyond which an image costs more than in smaller batches."""
        return self._efficient[tier]

    def batch_for_rate(self, tier: int, rate: float, limit: int) -> int:
        """Return the smallest batch with a throughput of `rate` images per second, else `limit`."""
        median, limit = self._median[tier], min(limit, len(self._median[tier]) - 1)
        rate *= self._factors[tier]
        return next((batch for batch in range(1, limit) if batch >= rate * median[batch]), limit)

    def largest_batch(self, tier: int, within_s: float, limit: int) -> int:
        """Return the largest batch up to `limit` whose p99 is at most `within_s`; 0 if none."""
        median, seconds = self._median[tier], within_s / (self._factors[tier] * self._tail[tier])
        # the median never falls from one batch to the next
        return bisect_right(median, seconds, 1, max(1, min(limit + 1, len(median)))) - 1


def _table(points: Mapping[int, float], max_batch: int) -> list[float]:
    """Return seconds by batch size (index 0 unused), interpolated and extrapolated linearly."""
    batches = np.array(sorted(points), dtype=float)
    seconds = np.maximum.accumulate([points[int(batch)] for batch in batches])
    sizes = np.arange(max_batch + 1, dtype=float)
    table = np.interp(sizes, batches, seconds)
    if len(batches) > 1:
        image_s, overhead_s = _fit_line(batches, seconds)
    else:  # a single point: assume no overhead
        image_s, overhead_s = float(seconds[0] / batches[0]), 0.0
    beyond = sizes > batches[-1]
    table[beyond] = seconds[-1] + (sizes[beyond] - batches[-1]) * image_s
    before = sizes < batches[0]
    share = (overhead_s + sizes[before] * image_s) / (overhead_s + batches[0] * image_s)
    table[before] = seconds[0] * share
    return [float(value) for value in table]


def _fit_line(batches: NDArray[np.float64], seconds: NDArray[np.float64]) -> tuple[float, float]:
    """Return seconds per image and overhead, both >= 0: least squares of the relative errors."""
    image_s, overhead_s = np.polyfit(batches, seconds, 1, w=1 / seconds)
    if image_s <= 0:  # no visible slope: nearly all is overhead
        return float(seconds.mean()) / 1000, float(seconds.mean())
    if overhead_s < 0:
        return float((seconds / batches).mean()), 0.0
    return float(image_s), float(overhead_s)


def _efficient_batch(median: Sequence[float]) -> int:
    """Return the largest batch whose cost per image is within EFFICIENT_GAIN of the lowest."""
    cost = [median[batch] / batch for batch in range(1, len(median))]
    return max(i + 1 for i, c in enumerate(cost) if c <= (1 + EFFICIENT_GAIN) * min(cost))


def _useful_batch(median: Sequence[float]) -> int:
    """Return the smallest batch whose cost per image is within BATCH_GAIN of the lowest."""
    cost = [median[batch] / batch for batch in range(1, len(median))]
    return next(i + 1 for i, c in enumerate(cost) if c <= (1 + BATCH_GAIN) * min(cost))
