"""Calibrate a bundle's tiers: temperatures, and what second looks gain by the first margin.

    temperature   minimises the negative log-likelihood of the right classes (Guo et al., "On
                  Calibration of Modern Neural Networks", ICML 2017)
    gain          P(turns right) - P(turns wrong) of images of similar margin: what the second
                  tier's own probabilities say, times one scale for all pairs of tiers, which the
                  right classes give; isotonic: it never rises with the margin

The second tier gives its own answer a higher probability than the first tier's answer, and the
difference is what it expects to gain. Its mean over a group of images varies far less than the
share of images that turned right minus those that turned wrong, which few images decide.

Right is the image's label or, without labels, the class of the same model at k = 1.0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression  # type: ignore[import-untyped]

from pcae_export.images import decode
from pcae_export.measure import BATCH, Measured, full_tier, mean_interval
from pcae_export.progress import Progress
from pcae_serve.bundle.calibration import Calibration, SecondLook, TierCalibration
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.probabilities import margin, softmax
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import Engine
from pcae_training.data import LabelledImages

#: Images in a group of similar margin, at least, and groups of all images, at most.
GROUP_IMAGES, GROUPS = 50, 40
#: Fewer images than this say too little.
LEAST_IMAGES = 200
#: Bounds of a temperature.
COLDEST, HOTTEST = 0.05, 20.0
#: Standard errors on either side of a 95 % interval.
NORMAL_975 = 1.96


@dataclass(frozen=True)
class Answers:
    """What every tier answered to the same N images."""

    logits: Mapping[str, NDArray[np.float32]]  # by tier, [N, classes]
    right: Mapping[str, NDArray[np.int64]]  # by tier, [N]: the classes that are right
    labelled: bool  # `right` are labels, else the classes of the tier's own model at k = 1.0
    data_set: str

    def correct(self, tier: str) -> NDArray[np.bool_]:
        """Return which images [N] a tier answers right."""
        found: NDArray[np.bool_] = self.logits[tier].argmax(axis=1) == self.right[tier]
        return found


def collect_answers(
    bundle: Bundle, engine: Engine, images: LabelledImages, rows: Sequence[int], labelled: bool
) -> Answers:
    """Run the given rows of `images` on every tier. labelled: their labels are the bundle's."""
    logits = {tier.name: list[NDArray[np.float32]]() for tier in bundle.tiers}
    right = {tier.name: list[NDArray[np.int64]]() for tier in bundle.tiers}
    full = {model: full_tier(bundle, model) for model in bundle.manifest.models}
    with Progress("calibrating", len(rows), "images") as progress:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            pixels, classes = decode(images, batch), {}
            if not labelled:
                for model, tier in full.items():
                    classes[model] = engine.run(tier, pixels).vectors.argmax(axis=1)
            for tier in bundle.tiers:
                logits[tier.name].append(engine.run(tier, pixels).vectors)
                known = images.labels[batch].numpy() if labelled else classes[tier.model]
                right[tier.name].append(known)
            progress.update(len(batch))
    return Answers(
        {name: np.concatenate(parts) for name, parts in logits.items()},
        {name: np.concatenate(parts) for name, parts in right.items()},
        labelled,
        images.name,
    )


def calibrate(answers: Answers, tiers: Sequence[Tier]) -> Calibration | None:
    """Return the calibration of `tiers`, the cheapest first; None if there are too few images."""
    n = len(answers.right[tiers[0].name])
    if n < LEAST_IMAGES:
        return None
    found, groups = dict[str, TierCalibration](), dict[str, list[NDArray[np.int64]]]()
    for tier in tiers:
        logits = answers.logits[tier.name]
        temperature = fit_temperature(logits, answers.right[tier.name])
        margins = margin(logits, temperature)
        order = np.argsort(margins, kind="stable")
        groups[tier.name] = np.array_split(order, min(GROUPS, n // GROUP_IMAGES))
        found[tier.name] = TierCalibration(
            temperature=temperature,
            margins=tuple(float(margins[rows].max()) for rows in groups[tier.name]),
            shares=tuple(len(rows) / n for rows in groups[tier.name]),
        )
    pairs = [
        (first.name, second.name)
        for first, second in combinations(tiers, 2)
        # without labels, models are right about themselves only
        if answers.labelled or first.model == second.model
    ]
    expected = {pair: expected_gains(answers, *pair, found[pair[1]].temperature) for pair in pairs}
    scale = fit_scale([expected[pair] for pair in pairs], [_gained(answers, *p) for p in pairs])
    looks = tuple(_second_look(*pair, expected[pair], scale, groups[pair[0]]) for pair in pairs)
    return Calibration(
        n=n,
        data_set=answers.data_set,
        right="label" if answers.labelled else "full",
        tiers=found,
        second_looks=looks,
    )


def fit_temperature(logits: NDArray[np.float32], right: NDArray[np.int64]) -> float:
    """Return the temperature that makes the right classes [N] most likely, given logits [N, C].

    As if one image in N + 2 had a random class: N right answers do not make the next one certain.
    """
    n = len(right)

    def loss(log_temperature: float) -> float:
        likelihood = np.log(softmax(logits.astype(np.float64) / np.exp(log_temperature)) + 1e-12)
        of_right = likelihood[np.arange(n), right].mean()
        return -float(of_right + (likelihood.mean() - of_right) / (n + 2))

    bounds = float(np.log(COLDEST)), float(np.log(HOTTEST))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


@dataclass(frozen=True)
class Scale:
    """What the tiers' own expectations of gains are multiplied by."""

    value: float
    deviation: float  # standard error


def expected_gains(
    answers: Answers, first: str, second: str, temperature: float
) -> NDArray[np.float64]:
    """Return what `second` expects to gain over `first`, per image [N]; at least 0.

    It is the probability of its own class minus that of the first tier's class, by its own logits.
    """
    probabilities = softmax(answers.logits[second] / temperature).astype(np.float64)
    other = answers.logits[first].argmax(axis=1)
    gains: NDArray[np.float64] = (
        probabilities.max(axis=1) - probabilities[np.arange(len(other)), other]
    )
    return gains


def fit_scale(
    expected: Sequence[NDArray[np.float64]], gained: Sequence[NDArray[np.float64]]
) -> Scale:
    """Return the scale, at least 0, with which expectations [pairs, N] are closest to the truth.

    gained [pairs, N]: 1 for images that turn right, -1 for those that turn wrong. By least squares;
    the images are independent, what the pairs say about one image is not.
    """
    means, truth = np.array(expected), np.array(gained)
    weight = float((means**2).sum())
    if weight == 0:  # no answer ever changes
        return Scale(1.0, 0.0)
    value = max(0.0, float((means * truth).sum()) / weight)
    by_image = ((truth - value * means) * means).sum(axis=0)
    return Scale(value, float(np.sqrt((by_image**2).sum())) / weight)


def _gained(answers: Answers, first: str, second: str) -> NDArray[np.float64]:
    """Return 1 for images [N] that turn right, -1 for those that turn wrong."""
    return answers.correct(second).astype(float) - answers.correct(first)


def _second_look(
    first: str,
    second: str,
    expected: NDArray[np.float64],
    scale: Scale,
    groups: Sequence[NDArray[np.int64]],
) -> SecondLook:
    """Return what `second` gains after `first`, per group of images of similar margin."""
    means, sizes = [expected[rows].mean() for rows in groups], [len(rows) for rows in groups]
    isotonic = IsotonicRegression(increasing=False)
    levels = isotonic.fit_transform(np.arange(len(groups)), means, sample_weight=sizes)
    halves = np.empty(len(groups))
    for level in np.unique(levels):  # the interval of all groups that were pooled
        pooled = np.nonzero(levels == level)[0]
        rows = np.concatenate([groups[place] for place in pooled.tolist()])
        low, high = mean_interval(expected[rows])
        halves[pooled] = np.hypot(
            scale.value * (high - low) / 2, NORMAL_975 * level * scale.deviation
        )
    gains = scale.value * levels
    # the gain falls with the margin, so do its bounds
    return SecondLook(
        first=first,
        second=second,
        gains=tuple(map(float, gains)),
        lows=tuple(map(float, np.minimum.accumulate(gains - halves))),
        highs=tuple(map(float, np.maximum.accumulate((gains + halves)[::-1])[::-1])),
    )


@dataclass(frozen=True)
class Cascade:
    """Images run on `first`; those of the smallest margins run again on `second`."""

    first: str
    second: str
    share: float  # of the images that run again
    macs: float  # mean per image
    quality: float  # top-1, or agreement with k = 1.0
    over: float  # quality minus that of the best single tier of at most as many MACs
    half_width: float  # of the 95 % interval of `over`, paired


def measure_cascades(
    measured: Mapping[str, Measured], tiers: Sequence[Tier], calibration: Calibration
) -> list[Cascade]:
    """Return, per second look and group, the cascade that runs images up to that group again.

    measured: with margins, on images apart from those of `calibration`.
    """
    found = list[Cascade]()
    macs = {tier.name: tier.macs for tier in tiers}
    for look in calibration.second_looks:
        first, second = measured[look.first], measured[look.second]
        if first.margins is None:
            continue
        for threshold, gain in zip(calibration.tiers[look.first].margins, look.gains, strict=True):
            if gain <= 0:
                break
            again = first.margins <= threshold
            scores = np.where(again, second.scores, first.scores)
            share = float(again.mean())
            mean_macs = macs[look.first] + share * macs[look.second]
            single = max(
                (measured[tier.name].scores for tier in tiers if tier.macs <= mean_macs),
                key=lambda of_tier: of_tier.mean(),
            )
            _, high = mean_interval(scores - single)
            over = float((scores - single).mean())
            cascade = Cascade(
                look.first, look.second, share, mean_macs, float(scores.mean()), over, high - over
            )
            found.append(cascade)
    return found


def best_cascades(cascades: Sequence[Cascade]) -> list[Cascade]:
    """Return those that no other one of at most as many MACs equals, the cheapest first."""
    front = list[Cascade]()
    for cascade in sorted(cascades, key=lambda each: (each.macs, -each.quality)):
        if not front or cascade.quality > front[-1].quality:
            front.append(cascade)
    return front
