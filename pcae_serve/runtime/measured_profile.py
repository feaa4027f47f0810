"""The content of a latency profile, and whether a machine can have been measured like that."""

from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from pcae_serve.bounded_json import read_json
from pcae_serve.frozen_model import FrozenModel
from pcae_serve.scheduling.latency import Latency, Seconds
from pcae_serve.settings import MAX_BATCH

#: Bounds for the ratio of p95 to median; few rounds on a busy machine can give any value.
SPREADS = (1.05, 2.0)
#: log(p99 / p50) over log(p95 / p50) of a log-normal: 2.326 / 1.645 standard deviations.
P99_FROM_P95 = 1.414

#: Limits of what is believed: size of the file, seconds of a batch, images in it, spread, and by
#: what factor a larger batch may be faster, because measured times have noise.
MAX_FILE_BYTES = 1_000_000
MAX_BATCH_S = 3600.0
MAX_POINT_BATCH = 4096
MAX_SPREAD = 1000.0
MAX_GAIN = 4.0


class Point(FrozenModel):
    """Seconds of one (tier, batch). A quantile is None if there are too few runs for it."""

    batch: int
    runs: int
    p50_s: float
    p95_s: float | None  # of at least 20 runs
    p99_s: float | None  # of at least 100 runs


class Origin(FrozenModel):
    """Where and when a profile was measured, for display; its key defines what it is valid for."""

    date: datetime
    processor: str
    gpu: str | None  # if the engine runs on one
    cores: int
    memory_gb: float
    threads: int  # of one batch; 0 = the backend's own choice
    versions: dict[str, str]


class Profile(FrozenModel):
    """Measured latencies, and the machine that they were measured on."""

    key: dict[str, str]
    origin: Origin
    spread: float  # p95 of run time over the median of its (tier, batch), over all runs
    points: dict[str, list[Point]]  # by tier name

    def latency(self, max_batch: int = MAX_BATCH) -> Latency:
        """Return a latency model that starts from these points."""
        return Latency(self.seconds(), max_batch)

    def seconds(self) -> list[dict[int, Seconds]]:
        """Return median and p99 by batch size, for each tier in the bundle's order."""
        return [
            {point.batch: Seconds(point.p50_s, self._p99_s(point)) for point in points}
            for points in self.points.values()
        ]

    def _p99_s(self, point: Point) -> float:
        """Return the measured p99, or one extrapolated from the p95 of a log-normal."""
        if point.p99_s is not None:
            return point.p99_s
        over_median = self.spread if point.p95_s is None else point.p95_s / point.p50_s
        return float(point.p50_s * np.clip(over_median, *SPREADS) ** P99_FROM_P95)

    def check(self) -> None:
        """Raise ValueError if no machine can have been measured like this."""
        if not 0 < self.spread <= MAX_SPREAD:
            raise ValueError(f"its spread cannot be {self.spread:g}")
        for tier, points in self.points.items():
            _check_points(tier, points)


def read_profile(path: Path) -> Profile:
    """Return the profile in a file.

    Raise OSError if it cannot be read, and ValueError, naming the file, if it is damaged or holds
    impossible numbers.
    """
    try:
        profile = Profile.model_validate(read_json(path, MAX_FILE_BYTES))
        profile.check()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "profile"
        raise ValueError(f"{path}: {where}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return profile


def _check_points(tier: str, points: Sequence[Point]) -> None:
    """Raise ValueError if no machine can have been measured like this."""
    if not points:
        raise ValueError(f"tier {tier!r} has no points")
    if [point.batch for point in points] != sorted({point.batch for point in points}):
        raise ValueError(f"the batches of tier {tier!r} are not in ascending order")
    for point in points:
        named = (point.p50_s, point.p95_s, point.p99_s)
        quantiles = [seconds for seconds in named if seconds is not None]
        possible = 0 < point.batch <= MAX_POINT_BATCH and point.runs > 0
        if not possible or quantiles[0] <= 0 or quantiles[-1] > MAX_BATCH_S:
            raise ValueError(f"batch {point.batch} of tier {tier!r} cannot take {quantiles} s")
        if quantiles != sorted(quantiles):
            raise ValueError(f"the quantiles of tier {tier!r}, {quantiles} s, do not ascend")
    for smaller, larger in pairwise(points):
        if larger.p50_s * MAX_GAIN < smaller.p50_s:
            raise ValueError(
                f"tier {tier!r} cannot take {smaller.p50_s:g} s for {smaller.batch} images and"
                f" {larger.p50_s:g} s for {larger.batch}"
            )
