"""How long a batch takes: a line through measured points per tier, corrected by what batches took.

It knows numbers only: no clock (times are given), no engine, no queue.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: Weight of the newest batch in the running correction: half the way in 3 batches, 99 % in 20.
CORRECTION_WEIGHT = 0.2
#: Without batches a slowdown fades: a burst of noise must not refuse callers for ever.
CORRECTION_HALF_LIFE_S = 20.0
#: A batch is worth filling until an image costs within 10 % of what it costs in an endless batch.
BATCH_GAIN = 0.10


@dataclass(frozen=True)
class Line:
    """Seconds of a batch of n: overhead_s + n * image_s."""

    overhead_s: float
    image_s: float

    def at(self, batch: int) -> float:
        return self.overhead_s + batch * self.image_s

    @classmethod
    def through(cls, points: Mapping[int, float]) -> "Line":
        """Least squares of relative errors through (batch, seconds); neither part is negative."""
        batches = np.array(list(points), dtype=float)
        seconds = np.array(list(points.values()), dtype=float)
        if len(points) > 1:
            image_s, overhead_s = np.polyfit(batches, seconds, 1, w=1 / seconds)
            if image_s <= 0:  # no slope to be seen: nearly all is overhead
                return cls(float(seconds.mean()), float(seconds.mean()) / 1000)
            if overhead_s >= 0:
                return cls(float(overhead_s), float(image_s))
        return cls(0.0, float((seconds / batches).mean()))


class Latency:
    """Predicts seconds per (tier, batch); tiers are counted as the bundle orders them."""

    def __init__(self, lines: Sequence[Line], spread: float = 1.1) -> None:
        """spread: how much longer than typical a batch must be expected to take (p95 / median)."""
        self._lines, self._spread = tuple(lines), max(1.0, spread)
        self._correction, self._observed_s = 1.0, 0.0

    def idle(self, tier: int) -> float:
        """Seconds that one image is promised in on a machine that does nothing else."""
        return self._lines[tier].at(1) * self._spread

    def expected(self, tier: int, batch: int, now_s: float) -> float:
        """Seconds that a batch typically takes."""
        return self._lines[tier].at(batch) * self._corrected(now_s)

    def promised(self, tier: int, batch: int, now_s: float) -> float:
        """Seconds within which a batch is done in about 19 of 20 cases: what deadlines go by."""
        return self.expected(tier, batch, now_s) * self._spread

    def useful_batch(self, tier: int) -> int:
        """The batch beyond which waiting for others costs time and gains next to nothing."""
        line = self._lines[tier]
        return max(1, int(np.ceil(line.overhead_s / (BATCH_GAIN * line.image_s))))

    def observe(self, tier: int, batch: int, seconds: float, now_s: float) -> None:
        """Learn from a batch that really took `seconds`."""
        ratio = seconds / self._lines[tier].at(batch)
        current = self._corrected(now_s)
        self._correction = current + CORRECTION_WEIGHT * (min(ratio, 10.0) - current)
        self._observed_s = now_s

    def _corrected(self, now_s: float) -> float:
        if self._correction <= 1:
            return self._correction  # faster than measured: there is no harm in believing it
        idle_s = max(0.0, now_s - self._observed_s)
        return float(1 + (self._correction - 1) * 0.5 ** (idle_s / CORRECTION_HALF_LIFE_S))
