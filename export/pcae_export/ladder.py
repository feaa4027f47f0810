"""A ladder of budgets from measured latencies: each rung as high as its step of the staircase.

    sweep   the tiers of an elastic graph at many keep ratios, to be timed
    climb   their times [rounds, tiers] -> Ladder:
            fit    a curve that never falls, and its noise
            edges  the points above which it jumps
            rungs  the points to serve at

Processors that work in tiles make latency a staircase over the token count: inside a step more
tokens are free, so a budget belongs at its upper edge. Others show nearly a line; there no step is
made up, and the rungs are evenly spaced. It knows numbers and token counts: no engine, no clock.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from pcae_export.pack import DEFAULT_TIERS
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.bundle.tokens import KeepRatio, parse_keep_ratio
from pcae_serve.errors import BundleError
from pcae_training.checkpoint import from_config

#: Between neighbouring keep ratios of a sweep.
SPACING = Decimal("0.02")
#: Fewer rounds or points than these cannot tell a step from noise.
MIN_ROUNDS, MIN_POINTS = 7, 8
#: A step rises above the trend by more than so many standard errors of a point, …
STEP_ERRORS = 6.0
#: … by more than this share of the latency, below which no budget is worth moving, …
STEP_SHARE = 0.02
#: … and by more than this share of what the trend itself rises there.
STEP_TREND = 0.5

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rung:
    """A budget to serve at."""

    name: str
    keep_ratio: float
    seconds: float  # expected of a batch
    below_step: bool  # the next budget up costs a jump

    @property
    def flag(self) -> str:
        """As `pcae-export bundle` takes it."""
        return f"--tier {self.name}={self.keep_ratio:g}"


@dataclass(frozen=True)
class KeepRatioLadder:
    """What was measured, and what it proposes. Points are by MACs, the cheapest first."""

    rounds: int
    noise: float | None  # standard error of a point over its seconds; None: too few rounds
    keep_ratios: tuple[float, ...]
    seconds: tuple[float, ...]  # of a batch at these keep ratios, on the fitted curve
    edges: tuple[int, ...]  # points above which the latency jumps
    rungs: tuple[Rung, ...]


def sweep(bundle: Bundle, lowest: KeepRatio) -> tuple[Tier, ...]:
    """Tiers of the costliest tier's model at keep ratios from `lowest` to 1, the cheapest first.

    They are for an engine on the elastic graph, where a tier is a row of numbers. Keep ratios that
    come to the same counts, or leave no patch, are left out.
    Raises BundleError where config.json does not tell the model's sizes.
    """
    full = bundle.tiers[-1]
    path = bundle.file(full.model, "config.json")
    try:
        geometry = from_config(json.loads(path.read_text()))[0].geometry
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} does not tell the model's sizes: {error!r}") from None
    tiers: dict[tuple[int, ...], Tier] = {}
    ratio = Decimal(1)
    while parse_keep_ratio(ratio) >= parse_keep_ratio(lowest):
        try:
            counts = geometry.counts(ratio)
        except ValueError:  # a stage is left without patches, and so it is at all lower ratios
            break
        name = "full" if ratio == 1 else f"k{100 * ratio:.0f}"
        costs = {"keep_ratio": float(ratio), "token_counts": counts, "macs": geometry.macs(counts)}
        tiers.setdefault(counts, full.model_copy(update={"name": name, **costs}))
        ratio -= SPACING
    return tuple(sorted(tiers.values(), key=lambda tier: tier.macs))


def climb(tiers: Sequence[Tier], rounds: Floats, count: int) -> KeepRatioLadder:
    """At most `count` rungs among `tiers`, by MACs, that were timed as rounds [rounds, tiers].

    Rungs as many as the paper's tiers bear their names.
    """
    seconds, noise = fit(rounds)
    jumps = edges(np.array([tier.macs for tier in tiers], float), seconds, noise)
    chosen = rungs(seconds, jumps, count)
    names = [tiers[i].name for i in chosen]
    if len(chosen) == len(DEFAULT_TIERS):
        names = list(DEFAULT_TIERS)
    return KeepRatioLadder(
        rounds=len(rounds),
        noise=noise if np.isfinite(noise) else None,
        keep_ratios=tuple(tier.keep_ratio for tier in tiers),
        seconds=tuple(seconds.tolist()),
        edges=jumps,
        rungs=tuple(
            Rung(name, tiers[i].keep_ratio, float(seconds[i]), i in jumps)
            for name, i in zip(names, chosen, strict=True)
        ),
    )


def fit(rounds: Floats) -> tuple[Floats, float]:
    """Seconds [points] that never fall, through rounds [rounds, points], and their noise.

    Noise is the standard error of a point over its seconds; infinite where the rounds are too few.
    What slows a whole round is taken out, by the median of its points over what is typical of them.
    """
    pace = np.median(rounds / np.median(rounds, axis=0), axis=1, keepdims=True)  # [rounds, 1]
    steady = rounds / pace
    p50 = np.median(steady, axis=0)
    seconds: Floats = isotonic_regression(p50).x
    if len(rounds) < MIN_ROUNDS:
        return seconds, float("inf")
    apart = np.abs(np.diff(steady, axis=0)) / p50  # of a point's neighbouring rounds
    scatter = np.median(apart) / 0.954  # to a normal deviation; a few slow runs do not count
    return seconds, float(1.25 * scatter / np.sqrt(len(rounds)))  # 1.25: of a median, not a mean


def edges(macs: Floats, seconds: Floats, noise: float) -> tuple[int, ...]:
    """Points i from which to i + 1 the latency jumps, on a curve from `fit` over its MACs.

    A jump is more than the smooth trend asks for, which is a quadratic: a processor is as a rule
    less busy with few tokens than with many.
    """
    if len(seconds) < MIN_POINTS or not np.isfinite(noise):
        return ()
    centred = (macs - macs.mean()) / np.ptp(macs)
    trend = np.clip(np.diff(np.polyval(np.polyfit(centred, seconds, 2), centred)), 0, None)
    excess = np.diff(seconds) - trend
    beyond_noise = excess > max(STEP_ERRORS * noise, STEP_SHARE) * seconds[1:]
    return tuple(np.flatnonzero(beyond_noise & (excess > STEP_TREND * trend)).tolist())


def rungs(seconds: Floats, edges: Sequence[int], count: int) -> tuple[int, ...]:
    """At most `count` points, the last among them, evenly spaced in log latency.

    Each moves up to the edge of its step, unless that costs half a rung or more. Fewer points come
    back where several rungs stand on one step.
    """
    log, last = np.log(seconds), len(seconds) - 1
    half = (log[-1] - log[0]) / max(1, count - 1) / 2
    chosen = {last}
    for target in np.linspace(log[-1], log[0], count):
        nearest = np.argmin(np.abs(log - target))
        point = int(np.flatnonzero(seconds == seconds[nearest])[-1])  # more tokens, the same time
        edge = min(e for e in (*edges, last) if e >= point)
        chosen.add(edge if edges and log[edge] - log[point] < half else point)
    return tuple(sorted(chosen))
