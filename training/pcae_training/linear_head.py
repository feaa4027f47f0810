"""Fit a linear head to the features of a frozen model, and measure it by cross-validation.

    features by keep ratio -> ways to fit a head -> out-of-fold logits of each -> the best, fitted

One head serves all keep ratios, as one set of weights does. A head per keep ratio is measured as
well, to show what that costs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.model_selection import StratifiedKFold  # type: ignore[import-untyped]

from pcae_training.readouts import LinearMethod, fit_linear

Floats = NDArray[np.float64]
#: What a head is fitted on: features at the largest keep ratio, at all of them, or a head for each.
Origin = Literal["largest", "all", "each"]
#: By keep ratio, the largest first: features [n, D] or logits [n, classes].
ByRatio = Mapping[float, Floats]

#: Folds of the cross-validation; fewer if a class has fewer images.
FOLDS = 5
#: Logistic regression takes minutes with more rows (images x keep ratios) than this.
LOGISTIC_ROWS = 5_000
#: Bounds of the temperature's logarithm.
_LOG_TEMPERATURE = (-4.0, 4.0)


@dataclass(frozen=True)
class HeadScore:
    """Out-of-fold results of one way to fit a head."""

    method: LinearMethod
    origin: Origin
    logits: ByRatio
    labels: NDArray[np.int64]  # [n]

    def correct(self, ratio: float) -> NDArray[np.bool_]:
        """Return [n]: whether each image has its label, by a head that has not seen it."""
        found: NDArray[np.bool_] = self.logits[ratio].argmax(axis=1) == self.labels
        return found

    @property
    def top1(self) -> float:
        """Return top-1, the mean over the keep ratios."""
        return float(np.mean([self.correct(ratio).mean() for ratio in self.logits]))

    @property
    def temperature(self) -> float:
        """Return the divisor of the logits that makes their softmax fit the labels best.

        The other classes have a share of 1 / (n + 2) of each label (Platt 1999): n images without
        an error do not show that there are none.
        """
        logits = np.concatenate(list(self.logits.values()))
        labels = np.tile(self.labels, len(self.logits))
        classes = logits.shape[1]
        share = 1 / (len(self.labels) + 2)
        targets = np.full(logits.shape, share / (classes - 1))
        targets[np.arange(len(labels)), labels] = 1 - share

        def loss(log_temperature: float) -> float:
            scaled = log_softmax(logits / np.exp(log_temperature), axis=1)
            return -float((targets * scaled).sum(axis=1).mean())

        return float(np.exp(minimize_scalar(loss, bounds=_LOG_TEMPERATURE, method="bounded").x))


@dataclass(frozen=True)
class LinearHead:
    """A fitted head, the ways to fit it that were compared, and which was chosen."""

    weight: Floats  # [classes, D]
    bias: Floats  # [classes]
    chosen: HeadScore
    compared: tuple[HeadScore, ...]
    folds: int


def fit_head(features: ByRatio, labels: NDArray[np.int64], seed: int = 0) -> LinearHead:
    """Fit a head to features [n, D] by keep ratio, the largest first, and labels int64 [n].

    The best of the compared ways is fitted again on all images. Its logits are divided by a
    temperature, so that their softmax is a probability. Raise ValueError if a class has one image.
    """
    fewest = int(np.unique(labels, return_counts=True)[1].min())
    if fewest < 2:
        raise ValueError("a class has a single image")
    folds = StratifiedKFold(min(FOLDS, fewest), shuffle=True, random_state=seed)
    parts = list(folds.split(labels, labels))
    methods: list[LinearMethod] = ["ridge"]
    if len(labels) * len(features) <= LOGISTIC_ROWS:
        methods.append("logistic")
    origins: list[Origin] = ["largest", "all", "each"] if len(features) > 1 else ["largest"]
    compared = [
        _cross_validate(features, labels, parts, method, origin)
        for method, origin in product(methods, origins)
    ]
    chosen = max((score for score in compared if score.origin != "each"), key=lambda s: s.top1)
    weight, bias = fit_linear(chosen.method, *_gather(features, labels, chosen.origin))
    divisor = chosen.temperature
    return LinearHead(weight / divisor, bias / divisor, chosen, tuple(compared), len(parts))


def _cross_validate(
    features: ByRatio,
    labels: NDArray[np.int64],
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
    method: LinearMethod,
    origin: Origin,
) -> HeadScore:
    """Return the logits of every image, each from a head that was fitted without it."""
    classes = int(labels.max()) + 1
    logits = {ratio: np.zeros((len(labels), classes)) for ratio in features}
    for train, test in parts:
        known = {ratio: rows[train] for ratio, rows in features.items()}
        shared = None
        if origin != "each":
            shared = fit_linear(method, *_gather(known, labels[train], origin))
        for ratio, rows in features.items():
            weight, bias = shared or fit_linear(method, known[ratio], labels[train])
            logits[ratio][test] = rows[test] @ weight.T + bias
    return HeadScore(method, origin, logits, labels)


def _gather(
    features: ByRatio, labels: NDArray[np.int64], origin: Origin
) -> tuple[Floats, NDArray[np.int64]]:
    """Return the features to fit on and their labels."""
    if origin == "largest":
        return next(iter(features.values())), labels
    return np.concatenate(list(features.values())), np.tile(labels, len(features))
