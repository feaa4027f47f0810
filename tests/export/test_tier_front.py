"""Of measured candidates the few worth serving are chosen, apart by more than their noise."""

import numpy as np
import pytest

from pcae_export.measure import Measured
from pcae_export.tier_front import MAX_TIERS, MIN_STEP, Candidate, Front, choose_tiers
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.quality import Accuracy, Fidelity

N = 1000


def candidate(ratio: float, ms: float, right: int, precision: str = "float32") -> Candidate:
    """Right on the first `right` of N images: pairs then differ by exactly the difference."""
    scores = (np.arange(N) < right).astype(float)
    quality = Accuracy(top1=right / N, n=N, interval=(0, 1), data_set="toys")
    return Candidate(tier(ratio, precision), Measured(quality, scores), ms / 1e3)


def tier(ratio: float, precision: str = "float32") -> Tier:
    return Tier(
        name=f"k{100 * ratio:.0f}-{precision}", model="vit", keep_ratio=ratio, token_counts=(),
        macs=int(1e6 * ratio), precision=precision,
    )  # fmt: skip


def chosen(*candidates: Candidate, max_loss: float = 0.1) -> list[str]:
    return [f"{name}={c.tier.name}" for name, c in front(*candidates, max_loss=max_loss).named()]


def front(*candidates: Candidate, max_loss: float = 0.1) -> Front:
    """The first candidate is the reference. Their order does not matter."""
    shuffled = [candidates[i] for i in np.random.default_rng(0).permutation(len(candidates))]
    return choose_tiers(shuffled, candidates[0], 0.01, max_loss)


FULL = candidate(1, 100, 900)


def test_each_level_of_quality_has_its_fastest_candidate() -> None:
    """0.9 loses nothing that 1,000 images show, 0.5 loses 3 points, 0.4 no more than 0.5."""
    right = {0.9: 900, 0.7: 899, 0.5: 870, 0.4: 869}
    levels = [candidate(ratio, 100 * ratio, images) for ratio, images in right.items()]
    assert chosen(FULL, *levels) == [
        "fast=k40-float32",
        "balanced=k70-float32",
        "full=k100-float32",
    ]


def test_a_candidate_that_is_slower_and_worse_is_left_out() -> None:
    found = front(FULL, candidate(0.7, 120, 890), candidate(1, 60, 898, "int8"))
    assert [c.tier.name for c in found.optimal] == ["k100-int8", "k100-float32"]
    assert [c.tier.name for c in found.chosen] == ["k100-int8", "k100-float32"]
    assert [c.seconds for c in found.candidates] == sorted(c.seconds for c in found.candidates)


def test_the_reference_stays_although_a_faster_candidate_is_better() -> None:
    better = candidate(0.6, 50, 920)
    assert chosen(FULL, better) == ["fast=k60-float32", "full=k100-float32"]


def test_a_step_that_is_too_small_is_none() -> None:
    assert chosen(FULL, candidate(0.9, 100 / MIN_STEP + 1, 900)) == ["full=k100-float32"]
    assert chosen(FULL, candidate(0.9, 100 / MIN_STEP, 900)) == ["fast=k90-float32", "full=k100-float32"]  # fmt: skip  # noqa: E501
    too_near = [candidate(0.5, 50, 870), candidate(0.4, 45, 840)]
    assert chosen(FULL, *too_near) == ["fast=k50-float32", "full=k100-float32"]


def test_a_loss_that_is_not_shown_is_no_level() -> None:
    """4 of 1,000 images are within the noise, and two faster tiers of one level are one."""
    assert chosen(FULL, candidate(0.6, 60, 896), candidate(0.3, 30, 896)) == [
        "fast=k30-float32", "full=k100-float32",
    ]  # fmt: skip


def test_a_loss_above_a_point_is_a_level_even_if_few_images_do_not_show_it() -> None:
    """With few images nothing is shown; the fastest candidate may still not pass as equal."""
    few = [
        Candidate(c.tier, Measured(c.measured.quality, c.measured.scores[860:]), c.seconds)
        for c in (FULL, candidate(0.5, 50, 897))
    ]
    assert chosen(*few) == ["full=k100-float32"]  # 40 of 140 images against 37


def test_tiers_far_below_the_best_are_left_out() -> None:
    poor = candidate(0.2, 20, 790)
    assert chosen(FULL, poor) == ["full=k100-float32"]
    assert chosen(FULL, poor, max_loss=0.12) == ["fast=k20-float32", "full=k100-float32"]


@pytest.mark.parametrize("count", range(1, 9))
def test_names_and_number(count: int) -> None:
    steps = [candidate(1 / (1 + i), 100 / 1.3**i, 900 - 12 * i) for i in range(count)]
    names = [name for name, _ in front(*steps).named()]
    assert len(names) == min(count, MAX_TIERS)
    assert names[-1] == "full"
    assert count == 1 or names[0] == "fast"


def test_the_narrowest_gap_is_closed_first() -> None:
    times = [100, 75, 55, 40, 30, 10]
    steps = [candidate(1 - i / 10, ms, 900 - 12 * i) for i, ms in enumerate(times)]
    assert [round(1e3 * c.seconds) for c in front(*steps).chosen] == [10, 30, 40, 55, 100]


def test_features_are_compared_by_their_cosines() -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, N)

    def features(ratio: float, ms: float, cosine: float) -> Candidate:
        scores = np.minimum(1, cosine + noise) if ratio < 1 else np.ones(N)
        quality = Fidelity(cosine=cosine, n=N, data_set="toys")
        return Candidate(tier(ratio), Measured(quality, scores), ms / 1e3)

    found = front(features(1, 100, 1), features(0.7, 70, 0.96), features(0.3, 30, 0.7))
    assert [name for name, _ in found.named()] == ["fast", "full"]
    assert found.chosen[0].tier.keep_ratio == 0.7
