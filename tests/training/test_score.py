import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcae_training.score import Difference, Score, Top1


def scored(right: Any, confidence: Tensor) -> Score:
    """The score of two classes, of images that are all of class 0."""
    wrong = (~torch.tensor(right).bool()).long()
    return Score(torch.zeros_like(wrong), wrong, None, confidence)


def random_answers(n: int = 400, classes: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return 2 * torch.randn(n, classes), torch.randint(classes, (n,))


def test_top1_tells_its_interval() -> None:
    top1 = Top1(correct=4600, n=5000)
    assert top1.value == 0.92
    assert top1.interval == pytest.approx((0.9122, 0.9272), abs=1e-4)  # Wilson
    assert str(top1) == "92.00 % [91.22, 92.72] of 5,000"
    assert Top1(5, 5).interval[1] == pytest.approx(1)


def test_a_score_agrees_with_a_slow_one(slow_score: Any) -> None:
    logits, labels = random_answers()
    score, expected = Score.from_logits(logits, labels), slow_score(logits, labels)
    assert score.top1 == Top1(sum(expected.top1), 400)
    assert score.top5 == Top1(sum(expected.top5), 400)
    assert 0 < score.top1.correct < score.top5.correct < 400
    assert score.confidence.tolist() == pytest.approx(expected.confidence, abs=1e-6)
    assert score.calibration_error == pytest.approx(expected.calibration_error, abs=1e-6)


def test_calibration_error_where_it_is_known() -> None:
    def error(confidence: list[float], right: list[bool]) -> float:
        return scored(right, torch.tensor(confidence)).calibration_error

    assert error([0.75] * 4, [True, True, True, False]) == pytest.approx(0)
    assert error([1.0] * 3, [False] * 3) == pytest.approx(1)
    assert error([0.9, 0.5], [False, True]) == pytest.approx((0.9 + 0.5) / 2)  # bins do not cancel
    assert error([0.62, 0.65], [True, False]) == pytest.approx(abs(0.62 + 0.65 - 1) / 2)  # one does


def test_no_top5_below_six_classes() -> None:
    logits, labels = random_answers(classes=5)
    assert Score.from_logits(logits, labels).top5 is None
    logits, labels = random_answers(classes=6)
    assert Score.from_logits(logits, labels).top5 is not None


def test_scores_of_parts_add_up() -> None:
    logits, labels = random_answers()
    whole = Score.from_logits(logits, labels)
    parts = [
        Score.from_logits(logits[:130], labels[:130]),
        Score.from_logits(logits[130:], labels[130:]),
    ]
    for score in (parts[0] + parts[1], pickle.loads(pickle.dumps(Score.join(parts)))):
        assert (score.n, score.top1, score.top5) == (400, whole.top1, whole.top5)
        assert score.calibration_error == pytest.approx(whole.calibration_error)
    with pytest.raises(ValueError, match="no scores"):
        Score.join([])


def test_a_difference_counts_the_images_that_one_alone_gets() -> None:
    def score(right: list[int]) -> Score:
        return scored(right, torch.ones(len(right)))

    difference = score([1, 1, 0, 0, 1]).against(score([1, 0, 1, 1, 0]))
    assert difference == Difference(gained=2, lost=2, n=5)
    assert score([1, 0, 0]).against(score([1, 1, 1])).value == pytest.approx(-2 / 3)
    with pytest.raises(ValueError, match="5 results cannot be paired with 3"):
        score([1, 1, 1, 1, 1]).against(score([1, 1, 1]))


@pytest.mark.parametrize(("gained", "lost", "n"), [(12, 85, 5000), (3, 0, 40), (0, 0, 100)])
def test_an_interval_is_walds_after_one_more_image_either_way(
    gained: int, lost: int, n: int
) -> None:
    sample = np.array([1] * (gained + 1) + [-1] * (lost + 1) + [0] * (n - gained - lost))
    assert len(sample) == n + 2
    half = 1.959964 * sample.std() / math.sqrt(n + 2)
    expected = (sample.mean() - half, sample.mean() + half)
    assert Difference(gained, lost, n).interval == pytest.approx(expected, abs=1e-6)


def test_an_interval_covers_the_truth_19_times_of_20() -> None:
    rng, truth = np.random.default_rng(0), 0.02 - 0.05
    draws: NDArray[np.int64] = rng.multinomial(300, (0.02, 0.05, 0.93), size=2000)
    covered = 0
    for gained, lost, _ in draws.tolist():
        low, high = Difference(gained, lost, 300).interval
        covered += low <= truth <= high
    assert 0.935 < covered / 2000 < 0.975


def test_a_difference_stays_within_what_can_be() -> None:
    assert Difference(3, 0, 3).interval[1] == 1
    assert Difference(0, 3, 3).interval[0] == -1
    assert str(Difference(12, 85, 5000)).startswith("-1.46 [-1.8")
