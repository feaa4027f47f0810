"""Suggest keep ratios from measured latencies.

    sweep_tiers    tiers of an elastic graph at many keep ratios, to be timed
    suggest_tiers  times [rounds, tiers] -> Suggestion:
                   fit_latency    a non-decreasing curve and its noise
                   find_steps     points above which the latency jumps
                   choose_points  the points to serve at

On processors that compute in tiles, latency is a staircase over the token count: within one step,
more tokens cost no time, so a tier belongs at the upper edge of its step. On other processors the
curve is almost a line; no step is reported then, and the tiers are spaced evenly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from pcae_export.pack import DEFAULT_TIERS
from pcae_serve.bounded_json import read_json
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.bundle.tokens import KeepRatio, parse_keep_ratio
from pcae_serve.errors import BundleError
from pcae_training.model_config import from_config

#: Difference between neighbouring keep ratios of a sweep.
SPACING = Decimal("0.02")
#: With fewer rounds or points, a step cannot be distinguished from noise.
MIN_ROUNDS, MIN_POINTS = 7, 8
#: A step must exceed the trend by more than this number of standard errors of a point.
STEP_ERRORS = 6.0
#: It must also exceed it by this share of the latency; a smaller gain is not worth moving a tier.
STEP_SHARE = 0.02
#: It must also exceed it by this share of the trend's own increase at that point.
STEP_TREND = 0.5

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SuggestedTier:
    """A keep ratio to serve at."""

    name: str
    keep_ratio: float
    seconds: float  # expected time of one batch
    below_step: bool  # the latency jumps directly above this keep ratio

    @property
    def flag(self) -> str:
        """The tier as a flag of `pcae-export bundle`."""
        return f"--tier {self.name}={self.keep_ratio:g}"


@dataclass(frozen=True)
class Suggestion:
    """Measured latencies and the tiers that they suggest. Points ascend by MACs."""

    rounds: int
    noise: float | None  # standard error of a point, relative; None if there are too few rounds
    keep_ratios: tuple[float, ...]
    seconds: tuple[float, ...]  # fitted time of one batch at each keep ratio
    steps: tuple[int, ...]  # indices of points above which the latency jumps
    tiers: tuple[SuggestedTier, ...]


def sweep_tiers(
    bundle: Bundle, some: Tier, lowest: KeepRatio, spacing: Decimal = SPACING
) -> tuple[Tier, ...]:
    """Return tiers like `some` at keep ratios from `lowest` to 1, by MACs: its model and precision.

    An engine must run them on the elastic graph, which takes any token counts. Keep ratios that
    give the same counts as another, or leave no patch, are omitted.
    Raises BundleError if config.json lacks the model's sizes.
    """
    path = bundle.file(some.model, "config.json")
    try:
        geometry = from_config(read_json(path))[0].geometry
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} does not contain the model's sizes: {error!r}") from None
    tiers: dict[tuple[int, ...], Tier] = {}
    ratio = Decimal(1)
    while ratio > 0 and parse_keep_ratio(ratio) >= parse_keep_ratio(lowest):
        try:
            counts = geometry.counts(ratio)
        except ValueError:  # a stage has no patches left; lower ratios have none either
            break
        name = "full" if ratio == 1 else f"k{100 * ratio:.0f}"
        costs = {"keep_ratio": float(ratio), "token_counts": counts, "macs": geometry.macs(counts)}
        tiers.setdefault(counts, some.model_copy(update={"name": name, **costs}))
        ratio -= spacing
    return tuple(sorted(tiers.values(), key=lambda tier: tier.macs))


def suggest_tiers(tiers: Sequence[Tier], rounds: Floats, count: int) -> Suggestion:
    """Choose at most `count` of `tiers`, which ascend by MACs, from seconds [rounds, tiers].

    If there are as many as DEFAULT_TIERS, they take those names.
    """
    seconds, noise = fit_latency(rounds)
    steps = find_steps(np.array([tier.macs for tier in tiers], float), seconds, noise)
    chosen = choose_points(seconds, steps, count)
    names = [tiers[i].name for i in chosen]
    if len(chosen) == len(DEFAULT_TIERS):
        names = list(DEFAULT_TIERS)
    return Suggestion(
        rounds=len(rounds),
        noise=noise if np.isfinite(noise) else None,
        keep_ratios=tuple(tier.keep_ratio for tier in tiers),
        seconds=tuple(seconds.tolist()),
        steps=steps,
        tiers=tuple(
            SuggestedTier(name, tiers[i].keep_ratio, float(seconds[i]), i in steps)
            for name, i in zip(names, chosen, strict=True)
        ),
    )


def fit_latency(rounds: Floats) -> tuple[Floats, float]:
    """Fit non-decreasing seconds [points] to seconds [rounds, points]; return them and the noise.

    Noise is a point's standard error relative to its seconds, infinite below MIN_ROUNDS rounds.
    A slow-down of a whole round is removed: each round is divided by the median, over its points,
    of the ratio to the point's median.
    """
    pace = np.median(rounds / np.median(rounds, axis=0), axis=1, keepdims=True)  # [rounds, 1]
    steady = rounds / pace
    p50 = np.median(steady, axis=0)
    seconds: Floats = isotonic_regression(p50).x
    if len(rounds) < MIN_ROUNDS:
        return seconds, float("inf")
    apart = np.abs(np.diff(steady, axis=0)) / p50  # between neighbouring rounds of one point
    scatter = np.median(apart) / 0.954  # standard deviation if normal; robust to a few slow runs
    return seconds, float(1.25 * scatter / np.sqrt(len(rounds)))  # 1.25: median, not mean


def find_steps(macs: Floats, seconds: Floats, noise: float) -> tuple[int, ...]:
    """Return points i such that the latency jumps between i and i + 1.

    seconds [points] and noise come from `fit_latency`, macs [points] ascend. A jump exceeds the
    smooth trend, a quadratic: most processors are used less well with few tokens than with many.
    """
    if len(seconds) < MIN_POINTS or not np.isfinite(noise):
        return ()
    centred = (macs - macs.mean()) / np.ptp(macs)
    trend = np.clip(np.diff(np.polyval(np.polyfit(centred, seconds, 2), centred)), 0, None)
    excess = np.diff(seconds) - trend
    beyond_noise = excess > max(STEP_ERRORS * noise, STEP_SHARE) * seconds[1:]
    return tuple(np.flatnonzero(beyond_noise & (excess > STEP_TREND * trend)).tolist())


def choose_points(seconds: Floats, steps: Sequence[int], count: int) -> tuple[int, ...]:
    """Choose at most `count` points, the last included, evenly spaced in log latency.

    Each moves up to the edge of its step, unless that costs half the spacing or more. Points that
    move to the same edge are merged.
    """
    log, last = np.log(seconds), len(seconds) - 1
    half = (log[-1] - log[0]) / max(1, count - 1) / 2
    chosen = {last}
    for target in np.linspace(log[-1], log[0], count):
        nearest = np.argmin(np.abs(log - target))
        point = int(np.flatnonzero(seconds == seconds[nearest])[-1])  # more tokens in the same time
        edge = min(e for e in (*steps, last) if e >= point)
        chosen.add(edge if steps and log[edge] - log[point] < half else point)
    return tuple(sorted(chosen))
