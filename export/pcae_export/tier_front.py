"""Choose tiers from measured candidates: the few worth serving, apart by more than their noise.

    [Candidate] -> front (none is faster and better) -> Front: a reference and the chosen ones

Quality is compared on the same images, pair by pair (`ranking.Gain`); latency round by round.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log

from pcae_export.measure import Measured
from pcae_export.pack import DEFAULT_TIERS
from pcae_export.ranking import RESOLUTION, Gain
from pcae_serve.bundle.manifest import Tier

#: How much faster a tier must be than the next dearer one. Timings of one run differ by less.
MIN_STEP = 1.25
#: Most tiers to choose; names are those of the paper's five keep ratios.
MAX_TIERS = len(DEFAULT_TIERS)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A tier that could be served, with what was measured of it."""

    tier: Tier
    measured: Measured
    seconds: float  # median time of one image

    @property
    def score(self) -> float:
        """Return the mean score: top-1, share of equal answers, or mean cosine, in [-1, 1]."""
        return float(self.measured.scores.mean())

    def is_as_good_as(self, better: "Candidate") -> bool:
        """Whether its quality is at most RESOLUTION below, and a loss is not shown."""
        gain = Gain.between(better.measured, self.measured)
        return gain.value <= RESOLUTION and gain.interval[0] <= 0


@dataclass(frozen=True)
class Front:
    """Candidates, the Pareto-optimal ones, and those to serve; each from the fastest on."""

    candidates: tuple[Candidate, ...]
    optimal: tuple[Candidate, ...]  # none is both faster and at least as good
    chosen: tuple[Candidate, ...]  # the reference is the last one
    noise: float  # standard error of a median latency, relative; inf if there are too few rounds
    machine: str = ""  # that the latencies were measured on

    def named(self) -> Iterator[tuple[str, Candidate]]:
        """Yield the name of each chosen tier and its candidate, the fastest first."""
        return zip(_names(len(self.chosen)), self.chosen, strict=True)


def choose_tiers(
    candidates: Sequence[Candidate], reference: Candidate, noise: float, max_loss: float
) -> Front:
    """Choose up to MAX_TIERS candidates. The reference (keep ratio 1 in float32) is one of them.

    For each level of quality, the fastest candidate that is as good is taken. The next level begins
    MIN_STEP faster, where a loss is shown. max_loss: tiers this far below the best one are left
    out; a share of images, or a difference of cosines.
    """
    ordered = sorted(candidates, key=lambda c: (c.seconds, -c.score))
    optimal = [c for i, c in enumerate(ordered) if all(c.score > o.score for o in ordered[:i])]
    best = optimal[-1]
    useful = [c for c in optimal if best.score - c.score <= max_loss]
    steps, left = list[Candidate](), useful
    while left:
        leader = max(left, key=lambda c: c.score)
        pick = next(c for c in left if c.is_as_good_as(leader))  # the fastest; the leader at last
        steps.append(pick)
        left = [c for c in left if pick.seconds >= MIN_STEP * c.seconds and _is_worse(c, pick)]
    steps = [c for c in steps if reference.seconds >= MIN_STEP * c.seconds]
    chosen = _thin([*reversed(steps), reference])
    return Front(tuple(ordered), tuple(optimal), tuple(chosen), noise)


def _is_worse(candidate: Candidate, than: Candidate) -> bool:
    return Gain.between(than.measured, candidate.measured).interval[0] > 0


def _thin(chosen: list[Candidate]) -> list[Candidate]:
    """Drop tiers between the ends until MAX_TIERS are left, those in the narrowest gaps first."""
    while len(chosen) > MAX_TIERS:
        times = [log(candidate.seconds) for candidate in chosen]
        gaps = [after - before for before, after in pairwise(times)]
        around = [one + other for one, other in pairwise(gaps)]
        del chosen[1 + around.index(min(around))]
    return chosen


def _names(count: int) -> tuple[str, ...]:
    """Return names for tiers from the fastest to the reference."""
    kept = {1: [4], 2: [0, 4], 3: [0, 2, 4], 4: [0, 1, 2, 4]}.get(count, range(MAX_TIERS))
    names = tuple(DEFAULT_TIERS)
    return tuple(names[place] for place in kept)
