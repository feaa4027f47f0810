"""A linear head on features: folded standardisation, cross-validation, temperature."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

from pcae_training import linear_head
from pcae_training.linear_head import fit_head
from pcae_training.readouts import LinearMethod, fit_linear, predict


def clusters(n: int, classes: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, 8] around a centre per class, with scales and offsets far from standard."""
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centres = np.random.default_rng(9).normal(size=(classes, 8))
    features = centres[labels] + noise * draw.normal(size=(n, 8))
    return features * np.logspace(-2, 2, 8) + 5, labels


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("method", ["ridge", "logistic"])
def test_weight_and_bias_answer_as_the_readout_does(method: LinearMethod, classes: int) -> None:
    features, labels = clusters(60, classes, 0.8)
    others, _ = clusters(200, classes, 0.8, seed=1)
    weight, bias = fit_linear(method, features, labels)
    assert (weight.shape, bias.shape) == ((classes, 8), (classes,))
    answers = (others @ weight.T + bias).argmax(axis=1)
    assert np.array_equal(answers, predict(method, features, labels, others))


def test_two_classes_have_the_probabilities_of_logistic_regression() -> None:
    """Two logits, the second minus the first the margin: softmax is then the sigmoid."""
    features, labels = clusters(60, 2, 0.8)
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    weight, bias = fit_linear("logistic", features, labels)
    ours = softmax(features @ weight.T + bias, axis=1)
    models = [LogisticRegression(C=c, max_iter=1000) for c in (1e-3, 1e-2, 1e-1, 1.0)]
    theirs = [model.fit(standard, labels).predict_proba(standard) for model in models]
    assert min(np.abs(ours - found).max() for found in theirs) < 1e-3


def test_results_are_of_images_that_the_head_has_not_seen() -> None:
    """Noise says nothing about labels: a head that had seen the images would be right."""
    draw = np.random.default_rng(0)
    features, labels = draw.normal(size=(60, 100)), np.arange(60) % 3
    head = fit_head({1.0: features}, labels)
    assert head.chosen.top1 < 0.55
    assert ((features @ head.weight.T + head.bias).argmax(axis=1) == labels).mean() > 0.9
    assert head.folds == 5


def test_the_best_way_to_fit_one_head_is_chosen() -> None:
    """At the small keep ratio the features are moved, so a head of the largest alone fails."""
    features, labels = clusters(90, 3, 0.3)
    both = {1.0: features, 0.5: features[:, ::-1]}
    head = fit_head(both, labels)
    found = {(score.method, score.origin): score.top1 for score in head.compared}
    assert set(found) == {(m, o) for m in ("ridge", "logistic") for o in ("largest", "all", "each")}
    assert head.chosen.origin == "all"
    assert found["ridge", "largest"] < 0.8 < head.chosen.top1
    assert head.chosen.top1 == max(top1 for (_, origin), top1 in found.items() if origin != "each")
    assert list(head.chosen.logits) == [1.0, 0.5]


def test_probabilities_fit_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ridge regression's scores are about 0 and 1: as logits they would never be sure."""
    monkeypatch.setattr(linear_head, "LOGISTIC_ROWS", 0)
    features, labels = clusters(400, 4, 0.4)
    head = fit_head({1.0: features}, labels)
    assert {score.method for score in head.compared} == {"ridge"}
    others, truth = clusters(400, 4, 0.4, seed=1)
    probabilities = softmax(others @ head.weight.T + head.bias, axis=1)
    right = (probabilities.argmax(axis=1) == truth).mean()
    assert right > 0.9
    assert abs(probabilities.max(axis=1).mean() - right) < 0.03


def test_without_an_error_it_is_not_certain() -> None:
    features, labels = clusters(24, 3, 0.01)
    head = fit_head({1.0: features}, labels)
    assert head.chosen.top1 == 1
    probabilities = softmax(features @ head.weight.T + head.bias, axis=1)
    assert 0.9 < probabilities.max(axis=1).mean() < 0.99  # 25 of 26 would be 0.96


def test_a_class_with_one_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="a single image"):
        fit_head({1.0: np.eye(5)}, np.array([0, 0, 1, 1, 2]))


def test_folds_fit_the_smallest_class() -> None:
    features, labels = clusters(9, 3, 0.1)
    assert fit_head({1.0: features}, labels).folds == 3
