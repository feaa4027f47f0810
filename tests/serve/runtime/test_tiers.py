"""A bundle's tiers, as policies see them."""

import pytest

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.quality import Accuracy, Agreement, wilson_interval
from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.runtime.tiers import tier_table


@pytest.mark.parametrize(
    ("accuracy", "agreement", "wanted"),
    [
        ((0.6, 0.7, 0.8), (None, None, None), (0.6, 0.7, 0.8)),
        ((None, None, None), (0.9, 0.95, 1.0), (0.9, 0.95, 1.0)),
        ((None, None, None), (None, None, None), (0.9, 0.95, 1.0)),
        ((0.6, None, 0.8), (None, None, None), (0.9, 0.95, 1.0)),
    ],
)
def test_what_policies_are_told_of_accuracy(
    small_bundle: Bundle,
    accuracy: tuple[float | None, ...],
    agreement: tuple[float | None, ...],
    wanted: tuple[float, ...],
) -> None:
    def measured(tier: Tier, top1: float | None, share: float | None) -> Tier:
        known = {
            "accuracy": None
            if top1 is None
            else Accuracy(top1=top1, n=9, interval=(0, 1), data_set="toy"),
            "agreement": None if share is None else Agreement(share=share, n=9, data_set="toy"),
        }
        return tier.model_copy(update=known)

    tiers = list(map(measured, small_bundle.tiers, accuracy, agreement))
    found = tier_table(tiers)
    assert found.names == ("fast", "balanced", "full")
    assert found.accuracy == pytest.approx(wanted)


def evaluated(bundle: Bundle, n: int, *top1: float) -> list[Tier]:
    """Return the tiers with these accuracies on n images."""
    return [
        tier.model_copy(
            update={
                "accuracy": Accuracy(
                    top1=share, n=n, interval=wilson_interval(share, n), data_set="toy"
                )
            }
        )
        for tier, share in zip(bundle.tiers, top1, strict=True)
    ]


def test_differences_count_outside_their_interval(small_bundle: Bundle) -> None:
    table = tier_table(evaluated(small_bundle, 10_000, 0.80, 0.83, 0.835))
    assert table.margin[1][0] == pytest.approx(0.0108, abs=1e-4)
    assert table.counted((0, 1, 2)) == {0: 0.80, 1: 0.83, 2: 0.83}
    equal = tier_table(evaluated(small_bundle, 10_000, 0.80, 0.805, 0.81))
    assert equal.counted((0, 1, 2)) == {0: 0.80, 1: 0.80, 2: 0.80}


def test_too_few_images_do_not_make_tiers_equal(small_bundle: Bundle) -> None:
    few = tier_table(evaluated(small_bundle, 100, 0.80, 0.81, 0.82))
    assert few.counted((0, 1, 2)) == {0: 0.80, 1: 0.81, 2: 0.82}
    tied = tier_table(evaluated(small_bundle, 32, 0.375, 0.375, 0.375))
    assert tied.accuracy == pytest.approx((0.9, 0.95, 1.0))  # as if none had been measured
    different = tier_table(evaluated(small_bundle, 100, 0.30, 0.80, 0.82))
    assert different.counted((0, 1, 2)) == {0: 0.30, 1: 0.80, 2: 0.80}


def test_on_the_demo_every_tier_is_more_accurate_than_the_cheaper_ones() -> None:
    table = tier_table(load_bundle(demo_path()).tiers)
    counted = table.counted((0, 1, 2, 3))
    assert counted[0] < counted[1] < counted[2] < counted[3]
