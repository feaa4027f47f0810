"""How long a batch takes: measured quantiles per (tier, batch), corrected by what batches took.

    Latency    learns: one factor for the machine, one per tier, and how far batches scatter
    Forecast   what it says now: `p50` (median) and `p99` (p99) seconds of a batch

It knows numbers only: no clock (times are given), no engine, no queue.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np
from numpy.typing import NDArray

#: Weight of the newest batch in the machine's factor: half the way in 3 batches, 99 % in 20.
MACHINE_WEIGHT = 0.2
#: In a tier's own factor: what the machine's does not explain, more slowly.
TIER_WEIGHT = 0.05
#: Without batches a slowdown fades: a burst of noise must not refuse callers for ever.
HALF_LIFE_S = 20.0
#: One batch says at most that everything is so many times slower.
MAX_TIMES = 10.0
#: A batch is worth filling until an image costs within 10 % of what it costs in the best batch.
BATCH_GAIN = 0.10
#: The share of batches that a promise holds for.
PROMISE = 0.99
#: Step of the running p99, in log seconds: up by 0.99 of it on a batch above, down by 0.01 below.
TAIL_STEP = 0.05
#: A promise is never more than so many times the typical seconds, whatever was seen.
MAX_TAIL = 3.0


@dataclass(frozen=True)
class Seconds:
    """Of one (tier, batch)."""

    p50: float
    p99: float


class Latency:
    """Predicts seconds per (tier, batch); tiers are counted as the bundle orders them."""

    def __init__(self, points: Sequence[Mapping[int, Seconds]], max_batch: int) -> None:
        """points: for each tier, its measured seconds by batch size; between them lie lines."""
        self._median = [_table({b: s.p50 for b, s in tier.items()}, max_batch) for tier in points]
        # what the measurement says of scattering: p99 over median, the tier's own
        self._tail = [
            float(np.mean([min(max(1.0, s.p99 / s.p50), MAX_TAIL) for s in tier.values()]))
            for tier in points
        ]
        self._useful = [_useful_batch(median) for median in self._median]
        self._idle = [
            median[1] * tail for median, tail in zip(self._median, self._tail, strict=True)
        ]
        self._log_tail = [log(tail) for tail in self._tail]
        self._machine, self._tier = 1.0, [1.0] * len(points)
        self._observed_s = 0.0

    def forecast(self, now_s: float) -> "Forecast":
        """What batches started now would take."""
        machine, tiers = self._factors(now_s)
        factors = [machine * tier for tier in tiers]
        return Forecast(self._median, factors, self._tail, self._useful)

    def idle(self, tier: int) -> float:
        """Seconds that one image is promised in on a machine that does nothing else."""
        return self._idle[tier]

    def observe(self, tier: int, batch: int, seconds: float, now_s: float) -> None:
        """Learn from a batch that really took `seconds`."""
        machine, tiers = self._factors(now_s)
        ratio = min(seconds / self._median[tier][batch], MAX_TIMES * machine)
        self._log_tail[tier] += TAIL_STEP * (
            PROMISE if ratio > machine * tiers[tier] * self._tail[tier] else PROMISE - 1
        )
        self._log_tail[tier] = min(max(self._log_tail[tier], 0.0), log(MAX_TAIL))
        self._tail[tier] = exp(self._log_tail[tier])
        self._machine = machine + MACHINE_WEIGHT * (ratio / tiers[tier] - machine)
        tiers[tier] += TIER_WEIGHT * (ratio / machine - tiers[tier])
        self._tier, self._observed_s = tiers, now_s

    def _factors(self, now_s: float) -> tuple[float, list[float]]:
        """The machine's factor and each tier's, faded by the time without batches."""
        faded = 0.5 ** (max(0.0, now_s - self._observed_s) / HALF_LIFE_S)
        # faster than measured: there is no harm in believing it
        fade = [f if f <= 1 else 1 + (f - 1) * faded for f in (self._machine, *self._tier)]
        return fade[0], fade[1:]


class Forecast:
    """Seconds of batches started at one moment."""

    __slots__ = ("_factors", "_median", "_tail", "_useful")

    def __init__(
        self,
        median: Sequence[Sequence[float]],
        factors: Sequence[float],
        tail: Sequence[float],
        useful: Sequence[int],
    ) -> None:
        self._median, self._factors, self._tail, self._useful = median, factors, tail, useful

    def p50(self, tier: int, batch: int) -> float:
        """Seconds that half of such batches take at most."""
        return self._median[tier][batch] * self._factors[tier]

    def p99(self, tier: int, batch: int) -> float:
        """Seconds that 99 of 100 such batches take at most: what deadlines go by."""
        return self._median[tier][batch] * self._factors[tier] * self._tail[tier]

    def useful_batch(self, tier: int) -> int:
        """The batch beyond which waiting for others costs time and gains next to nothing."""
        return self._useful[tier]

    def keeping(self, tier: int, rate: float, most: int) -> int:
        """The least batch up to `most` that serves so many a second; `most` where none does."""
        median, most = self._median[tier], min(most, len(self._median[tier]) - 1)
        rate *= self._factors[tier]
        return next((batch for batch in range(1, most) if batch >= rate * median[batch]), most)

    def largest(self, tier: int, within_s: float, most: int) -> int:
        """The largest batch up to `most` that is promised within `within_s`; 0 where none is."""
        median, seconds = self._median[tier], within_s / (self._factors[tier] * self._tail[tier])
        # the median never falls from one batch to the next
        return bisect_right(median, seconds, 1, max(1, min(most + 1, len(median)))) - 1


def _table(points: Mapping[int, float], max_batch: int) -> list[float]:
    """Seconds by batch size, index 0 unused: lines between the points, and on past the last."""
    batches = np.array(sorted(points), dtype=float)
    seconds = np.maximum.accumulate([points[int(batch)] for batch in batches])
    wanted = np.arange(max_batch + 1, dtype=float)
    table = np.interp(wanted, batches, seconds)
    if len(batches) > 1:
        image_s, overhead_s = _line(batches, seconds)
    else:  # of one point nothing is known but that each image takes its share
        image_s, overhead_s = float(seconds[0] / batches[0]), 0.0
    beyond = wanted > batches[-1]
    table[beyond] = seconds[-1] + (wanted[beyond] - batches[-1]) * image_s
    before = wanted < batches[0]
    share = (overhead_s + wanted[before] * image_s) / (overhead_s + batches[0] * image_s)
    table[before] = seconds[0] * share
    return [float(value) for value in table]


def _line(batches: NDArray[np.float64], seconds: NDArray[np.float64]) -> tuple[float, float]:
    """Seconds an image and of overhead: least squares of relative errors, neither negative."""
    image_s, overhead_s = np.polyfit(batches, seconds, 1, w=1 / seconds)
    if image_s <= 0:  # no slope to be seen: nearly all is overhead
        return float(seconds.mean()) / 1000, float(seconds.mean())
    if overhead_s < 0:
        return float((seconds / batches).mean()), 0.0
    return float(image_s), float(overhead_s)


def _useful_batch(median: Sequence[float]) -> int:
    """The least batch whose images cost within BATCH_GAIN of the cheapest."""
    cost = [median[batch] / batch for batch in range(1, len(median))]
    return next(i + 1 for i, c in enumerate(cost) if c <= (1 + BATCH_GAIN) * min(cost))
