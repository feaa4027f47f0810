"""Mean average precision and F1 of independent labels."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score  # type: ignore[import-untyped]

from pcae_training.label_report import LabelReport
from pcae_training.label_score import LabelScore


def score(n: int = 60, classes: int = 4, seed: int = 0, signal: float = 1.0) -> LabelScore:
    """Noise around the labels; coarse, so that probabilities are often equal."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.rand(n, classes, generator=draws) < 0.3
    logits = torch.randn(n, classes, generator=draws) + signal * (2 * labels.float() - 1)
    return LabelScore.from_logits((logits * 2).round() / 2, labels)


def test_the_figures_are_those_of_scikit_learn() -> None:
    found = score()
    true, given = found.labels.numpy(), found.given.numpy()
    expected = average_precision_score(true, found.probabilities.numpy(), average=None)
    assert found.average_precision.tolist() == pytest.approx(expected.tolist())
    assert found.headline.value == pytest.approx(expected.mean())
    assert found.micro_f1 == pytest.approx(f1_score(true, given, average="micro"))
    assert found.macro_f1 == pytest.approx(f1_score(true, given, average="macro"))
    low, high = found.headline.interval
    assert low < found.headline.value < high
    assert found.n == found.headline.n == 60


def test_resampled_images_count_as_often_as_they_are_drawn() -> None:
    found, weights = score(12), np.array([0, 3, 1, 1, 0, 2, 1, 0, 1, 1, 1, 1], dtype=float)
    expected = average_precision_score(
        found.labels.numpy(), found.probabilities.numpy(), average=None, sample_weight=weights
    )
    assert found._precisions(weights[None])[0].tolist() == pytest.approx(expected.tolist())


def test_a_label_that_no_image_has_is_left_out() -> None:
    some = score()
    labels = some.labels.clone()
    labels[:, 1] = False
    found = LabelScore(labels, some.probabilities)
    known = np.delete(found.average_precision, 1)
    assert np.isnan(found.average_precision[1])
    assert found.headline.value == pytest.approx(known.mean())
    figures = LabelReport(found, "abcd").to_json()["labels"][1]
    assert figures["average_precision"] is figures["recall"] is figures["f1"] is None


def test_parts_of_the_images_are_joined() -> None:
    whole = score()
    parts = (slice(20), slice(0), slice(20, 60))
    joined = LabelScore.join([LabelScore(whole.labels[p], whole.probabilities[p]) for p in parts])
    assert joined.headline == whole.headline
    with pytest.raises(ValueError, match="no scores"):
        LabelScore.join([])


def test_a_difference_is_paired() -> None:
    """The same images are resampled for both, so a model does not differ from itself."""
    good, weak = score(), score(signal=0.2)
    assert good.against(good).interval == (0.0, 0.0)
    found = weak.against(good)
    assert found.value == pytest.approx(weak.headline.value - good.headline.value)
    assert found.interval[1] < 0
    with pytest.raises(ValueError, match="paired"):
        good.against(score(8))


def test_the_report_lists_the_lowest_labels_first() -> None:
    found = score()
    worst = "abcd"[int(found.average_precision.argmin())]
    lines = LabelReport(found, "abcd").lines()
    assert lines[0].split()[:4] == ["label", "images", "AP", "%"]
    assert lines[1].split()[0] == worst
    assert lines[-1] == "recall, precision and F1 at a probability of 0.5"
