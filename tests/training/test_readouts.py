"""Readouts of features."""

from typing import Any

import numpy as np
import pytest

from pcae_training.readouts import predict


def clusters(per_class: int, seed: int, scale: float = 1.0) -> tuple[Any, Any]:
    """Three classes in twelve dimensions, each around a direction of its own."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([2, 5, 7], per_class)
    centres = np.eye(12)[[0, 3, 8]].repeat(per_class, axis=0)
    return (4 * centres + rng.normal(size=(len(labels), 12))) * scale, labels


@pytest.mark.parametrize("method", ["knn", "ridge", "logistic"])
@pytest.mark.parametrize("per_class", [1, 2, 30])
def test_what_can_be_told_apart_is_learnt(method: Any, per_class: int) -> None:
    features, labels = clusters(per_class, seed=1)
    others, expected = clusters(40, seed=2)
    predicted = predict(method, features, labels, others)
    assert set(predicted) <= {2, 5, 7}
    assert (predicted == expected).mean() > (0.95 if per_class == 30 else 0.4)


def test_neighbours_are_compared_by_angle() -> None:
    features, labels = clusters(30, seed=1)
    others, _ = clusters(40, seed=2)
    one, two = (predict("knn", features, labels, others * scale, 5) for scale in (1, 100))
    assert (one == two).all()


def test_scale_does_not_matter_to_linear_readouts() -> None:
    features, labels = clusters(30, seed=1)
    others, _ = clusters(40, seed=2)
    factors = np.logspace(-3, 3, 12)
    one = predict("ridge", features, labels, others)
    assert (predict("ridge", features * factors, labels, others * factors) == one).all()
