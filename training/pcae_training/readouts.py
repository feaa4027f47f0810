"""Readouts of features: classifiers that show what a frozen model's features hold."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import (  # type: ignore[import-untyped]
    LogisticRegression,
    LogisticRegressionCV,
    RidgeClassifierCV,
)
from sklearn.neighbors import KNeighborsClassifier  # type: ignore[import-untyped]
from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

Method = Literal["knn", "ridge", "logistic"]
LinearMethod = Literal["ridge", "logistic"]
Array = npt.NDArray[Any]

#: Temperature of the votes of neighbours, as DINO weights them (arXiv 2104.14294).
TEMPERATURE = 0.07
#: Strengths of regularisation that are tried.
RIDGE_ALPHAS = np.logspace(-1, 5, 13)
LOGISTIC_CS = (1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 3


def predict(
    method: Method, features: Array, labels: Array, others: Array, neighbours: int = 20
) -> Array:
    """Return the labels of `others` [m, D], int64 [m], learnt from features [n, D] and labels [n].

    knn: the `neighbours` most similar by cosine, weighted. ridge and logistic: on standardised
    features, the regularisation chosen by cross-validation on the features alone.
    """
    model = _MODELS[method](labels, min(neighbours, len(features)))
    predicted: Array = model.fit(features, labels).predict(others)
    return predicted


def fit_linear(method: LinearMethod, features: Array, labels: Array) -> tuple[Array, Array]:
    """Fit a readout to features [n, D] and labels int64 [n], all of 0 to classes - 1 among them.

    Returns weight [classes, D] and bias [classes] for features as they are: the standardisation is
    part of them.
    """
    scaler, model = _MODELS[method](labels, 1).fit(features, labels)
    weight, bias = np.atleast_2d(model.coef_), model.intercept_
    if len(weight) == 1:  # of two classes: the second one's margin
        weight, bias = (np.concatenate([-values, values]) / 2 for values in (weight, bias))
    weight = weight / scaler.scale_
    return weight, bias - weight @ scaler.mean_


def _knn(_: Array, neighbours: int) -> Any:
    def votes(distances: Array) -> Array:
        return np.exp((1 - distances) / TEMPERATURE)

    return KNeighborsClassifier(neighbours, metric="cosine", weights=votes)


def _ridge(_: Array, __: int) -> Any:
    return make_pipeline(StandardScaler(), RidgeClassifierCV(RIDGE_ALPHAS))


def _logistic(labels: Array, _: int) -> Any:
    folds = min(FOLDS, int(np.unique(labels, return_counts=True)[1].min()))
    if folds < 2:  # a class with one image has nothing to be chosen by
        return make_pipeline(StandardScaler(), LogisticRegression(C=LOGISTIC_CS[1], max_iter=1000))
    model = LogisticRegressionCV(
        Cs=LOGISTIC_CS,
        cv=folds,
        l1_ratios=(0,),
        max_iter=1000,
        use_legacy_attributes=False,
        scoring="accuracy",
    )
    return make_pipeline(StandardScaler(), model)


_MODELS: dict[Method, Callable[[Array, int], Any]] = {
    "knn": _knn,
    "ridge": _ridge,
    "logistic": _logistic,
}
