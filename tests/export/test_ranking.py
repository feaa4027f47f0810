"""Dominated tiers, and warnings of too few images: paired by image, with an interval."""

from typing import Any

import numpy as np
import pytest

from pcae_export import pack
from pcae_export.measure import Measured
from pcae_export.pack import Part, TierSpec
from pcae_export.ranking import Gain, rank_tiers, warn_of_few_images
from pcae_serve.bundle.quality import Accuracy, Agreement, Fidelity


def top1(right: int, n: int, first: int = 0) -> Measured:
    """Right on `right` images, from the one numbered `first` on."""
    scores = np.zeros(n)
    scores[first : first + right] = 1
    share = float(scores.mean())
    return Measured(Accuracy(top1=share, n=n, interval=(0, 1), data_set="toys"), scores)


@pytest.fixture
def tiers(tiny: Any) -> Any:
    ratios = {"fast": 0.4, "mid": 0.6, "full": 1.0}
    return pack.plan_tiers({"vit": Part(tiny(), {n: TierSpec(k) for n, k in ratios.items()})})


def dominated(tiers: Any, measured: dict[str, Measured]) -> list[str]:
    return [tier.name for tier in rank_tiers(tiers, measured) if tier.dominated]


def test_a_tie_of_few_images_dominates_no_tier(tiers: Any) -> None:
    tied = {name: top1(12, 32) for name in ("fast", "mid", "full")}  # 37.5 % each
    assert dominated(tiers, tied) == []
    assert warn_of_few_images(tiers, tied) == (
        "32 images are too few to distinguish these tiers: fast and mid, mid and full; about 2,200"
        " show a difference of one point"
    )


def test_a_cheaper_tier_that_is_better_beyond_doubt_dominates(tiers: Any) -> None:
    measured = {"fast": top1(900, 1000), "mid": top1(860, 1000), "full": top1(910, 1000)}
    assert dominated(tiers, measured) == ["mid"]
    ranked = rank_tiers(tiers, measured)
    assert [tier.quality for tier in ranked] == [0.9, 0.86, 0.91]
    doubtful = measured | {"mid": top1(898, 1000, first=3)}
    assert dominated(tiers, doubtful) == []


def test_enough_images_need_no_warning(tiers: Any) -> None:
    n = 10_000
    equal = {"fast": top1(9000, n), "mid": top1(9010, n), "full": top1(9200, n)}
    assert warn_of_few_images(tiers, equal) is None
    assert warn_of_few_images(tiers, {}) is None
    assert dominated(tiers, {}) == []


def test_cosines_are_compared_by_their_mean(tiers: Any) -> None:
    noise = np.random.default_rng(0).normal(0, 0.001, 50)

    def near(cosine: float) -> Measured:
        return Measured(Fidelity(cosine=cosine, n=50, data_set="toys"), cosine + noise)

    measured = {"fast": near(0.95), "mid": near(0.9), "full": near(0.99)}
    assert dominated(tiers, measured) == ["mid"]
    one = {name: Measured(found.quality, found.scores[:1]) for name, found in measured.items()}
    assert dominated(tiers, one) == []


@pytest.mark.parametrize("labelled", [True, False])
def test_models_are_compared_by_labels_alone(tiny: Any, labelled: bool) -> None:
    """Agreement is with the tier's own model."""
    parts = {"small": Part(tiny(width=16), {"small": TierSpec(1.0)})}
    parts |= {"large": Part(tiny(), {"full": TierSpec(1.0)})}
    tiers = pack.plan_tiers(parts)
    measured = {"small": top1(900, 1000), "full": top1(800, 1000)}
    if not labelled:
        share = Agreement(share=0.5, n=1000, data_set="toys")
        measured = {name: Measured(share, found.scores) for name, found in measured.items()}
    assert dominated(tiers, measured) == (["full"] if labelled else [])


def test_the_interval_is_that_of_paired_proportions() -> None:
    gain = Gain.between(top1(60, 100), top1(50, 100, first=5))
    assert (gain.value, gain.n) == (0.1, 100)
    low, high = gain.interval
    assert low < 0.1 < high
    assert not gain.is_loss
    assert Gain.between(top1(5, 100), top1(60, 100)).is_loss
    with pytest.raises(ValueError, match="100 scores cannot be paired with 99"):
        Gain.between(top1(5, 100), top1(5, 99))
