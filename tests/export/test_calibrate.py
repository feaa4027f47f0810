"""Temperatures and the gains of second looks, from answers whose truth is known."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pcae_export import calibrate as calibrating
from pcae_export.calibrate import Answers, best_cascades, calibrate, measure_cascades
from pcae_export.measure import to_accuracy
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.probabilities import margin, softmax

N, CLASSES = 4000, 5
TIERS = [
    Tier(name=name, model="vit", keep_ratio=k, token_counts=(), macs=macs)
    for name, k, macs in (("fast", 0.3, 100), ("full", 1.0, 500))
]


def answers(seed: int = 0) -> Answers:
    """`full` is always right. `fast` says how sure it is, with logits three times too small."""
    draw = np.random.Generator(np.random.PCG64(seed))
    right = draw.integers(0, CLASSES, N)
    logits = draw.normal(0, 1.5, (N, CLASSES)).astype(np.float32)
    # the right class is drawn with the probabilities that the logits state
    drawn = (softmax(logits).cumsum(axis=1) > draw.random((N, 1))).argmax(axis=1)
    rows = np.arange(N)
    logits[rows, right], logits[rows, drawn] = logits[rows, drawn], logits[rows, right].copy()
    full: NDArray[np.float32] = np.eye(CLASSES, dtype=np.float32)[right] * 9
    third = (logits / 3).astype(np.float32)
    by_tier: dict[str, NDArray[np.float32]] = {"fast": third, "full": full}
    return Answers(by_tier, dict.fromkeys(by_tier, right), True, "toy")


def test_the_temperature_makes_probabilities_honest() -> None:
    known = answers()
    found = calibrating.fit_temperature(known.logits["fast"], known.right["fast"])
    assert found == pytest.approx(1 / 3, rel=0.1)
    sure = softmax(known.logits["fast"] / found).max(axis=1)
    assert sure.mean() == pytest.approx(known.correct("fast").mean(), abs=0.02)


def test_answers_that_were_all_right_are_not_certain() -> None:
    right = np.arange(300) % CLASSES
    logits: NDArray[np.float32] = np.eye(CLASSES, dtype=np.float32)[right] * 5
    found = calibrating.fit_temperature(logits, right)
    assert 0.99 < softmax(logits / found).max() < 0.9999


def test_gains_fall_with_the_margin_and_have_intervals() -> None:
    found = calibrate(answers(), TIERS)
    assert found is not None
    [look] = found.second_looks
    assert (look.first, look.second, found.n, found.right) == ("fast", "full", N, "label")
    assert look.gains[0] > 0.3 > 0.1 > look.gains[-1] >= 0
    assert list(look.gains) == sorted(look.gains, reverse=True)
    assert all(low <= gain <= high for low, gain, high in
               zip(look.lows, look.gains, look.highs, strict=True))  # fmt: skip
    shares, wrong = found.tiers["fast"].shares, 1 - answers().correct("fast").mean()
    assert sum(s * g for s, g in zip(shares, look.gains, strict=True)) == pytest.approx(wrong)
    assert sum(shares) == pytest.approx(1)


def test_a_second_look_that_gains_nothing_is_not_made_up() -> None:
    """Two tiers that guess: a steadily falling gain is all that noise can imitate."""
    draw = np.random.Generator(np.random.PCG64(1))
    right = draw.integers(0, CLASSES, N)
    logits = {t.name: draw.normal(size=(N, CLASSES)).astype(np.float32) for t in TIERS}
    found = calibrate(Answers(logits, dict.fromkeys(logits, right), True, "noise"), TIERS)
    assert found is not None
    shares, gains = found.tiers["fast"].shares, found.second_looks[0].gains
    assert sum(s * max(g, 0) for s, g in zip(shares, gains, strict=True)) < 0.03


def test_too_few_images_say_nothing() -> None:
    known = answers()
    few = Answers(
        {name: values[:199] for name, values in known.logits.items()},
        {name: values[:199] for name, values in known.right.items()},
        True,
        "toy",
    )
    assert calibrate(few, TIERS) is None


def test_a_model_without_labels_is_compared_with_itself_only() -> None:
    known = answers()
    other = TIERS[1].model_copy(update={"model": "other"})
    unlabelled = Answers(known.logits, known.right, False, "toy")
    found = calibrate(unlabelled, [TIERS[0], other])
    assert found is not None
    assert (found.right, found.second_looks) == ("full", ())


def test_cascades_are_measured_on_other_images_and_paired() -> None:
    known, tested = calibrate(answers(), TIERS), answers(seed=5)
    assert known is not None
    measured = {tier.name: to_accuracy(tested.correct(tier.name), "toy") for tier in TIERS}
    for name, found in measured.items():
        margins = margin(tested.logits[name], known.tiers[name].temperature)
        object.__setattr__(found, "margins", margins)
    cascades = measure_cascades(measured, TIERS, known)
    macs = [each.macs for each in cascades]
    assert macs == sorted(macs)
    assert all(100 < each.macs < 600 for each in cascades)
    for each in cascades:
        if each.macs < 500:  # `fast` is the best single tier of at most as many
            assert each.quality - each.over == pytest.approx(measured["fast"].scores.mean())
    assert any(each.over > each.half_width > 0 for each in cascades)
    front = best_cascades(cascades)
    assert [each.quality for each in front] == sorted({each.quality for each in front})
